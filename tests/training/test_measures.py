"""What exits are said to be worth, against the same figures worked out plainly."""

import math

import pytest
import torch
from torch.nn import functional as F

from exeunt.heads import ExitHead, ExitHeads, Probe
from exeunt.training import Depth, judge, measures, summary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_what_every_depth_says_of_a_token(monkeypatch, dtype, bias):
    monkeypatch.setattr(measures, "ROWS", 30)
    torch.manual_seed(0)
    weight, offset = torch.randn(50, 8).to(dtype), torch.randn(50) if bias else None
    depths = {e: Depth(h := torch.randn(100, 8).to(dtype), h, weight, offset) for e in (1, 4, 6)}
    labels, heads = torch.randint(50, (100,)), ExitHeads({4: ExitHead(probe=Probe(8))})
    torch.nn.init.normal_(heads[4].probe.weight)
    judged = judge(depths, labels, heads)
    logits = {e: F.linear(d.state, weight).float() + (0 if offset is None else offset) for e, d in depths.items()}
    for e, z in logits.items():
        top = z.softmax(-1).topk(2).values
        torch.testing.assert_close(judged[e]["margin"], top[:, 0] - top[:, 1])
        torch.testing.assert_close(judged[e]["nats"], F.cross_entropy(z, labels, reduction="none"))
        assert torch.equal(judged[e]["agrees"], z.argmax(-1) == logits[6].argmax(-1))
    assert "nats" not in judge(depths, None, None)[1] and "probe" not in judged[1]
    torch.testing.assert_close(judged[4]["probe"], heads[4].probe(depths[4].raw))

    found = summary([{e: {k: t[:40] for k, t in f.items()} for e, f in judged.items()},
                     {e: {k: t[40:] for k, t in f.items()} for e, f in judged.items()}])  # fmt: skip
    assert found["1"]["perplexity"] == pytest.approx(math.exp(F.cross_entropy(logits[1], labels)), rel=1e-4)
    agrees, sure = judged[4]["agrees"].float(), judged[4]["probe"] > 0.7
    assert found["4"]["agreement"] == pytest.approx(agrees.mean().item())
    expected = {"share": sure.float().mean().item(), "agreement": agrees[sure].mean().item()}
    assert found["4"]["probe"]["0.7"] == pytest.approx(expected)
    assert found["6"]["agreement"] == 1.0 and "margin" not in found["6"]
    with pytest.raises(ValueError, match="^the data is too short: there are no held-out tokens to measure on$"):
        summary([])
