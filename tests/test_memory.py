"""Huge pages: values stay, addresses but for weights mapped from a file, and memory says that the pages are there."""

import mmap
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

import exeunt
from exeunt import memory
from exeunt.ops import _backend

PAGE = 1 << 21


def huge_bytes(net):
    """Bytes on huge pages of the mappings that hold a model's parameters, as the system counts them."""
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in net.parameters()]
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = int(found[1], 16), int(found[2], 16)
            inside = any(start < end and begin < stop for begin, end in ranges)
        elif inside and line.startswith("AnonHugePages"):
            held += int(line.split()[1]) * 1024
    return held


@pytest.fixture
def pages():
    if not exeunt.huge_pages(torch.nn.Linear(4096, 1024)):
        pytest.skip("this system has no huge pages to give")


def model(weight):
    """Two layers, the second tied to the first, and a small norm."""
    first, second = torch.nn.Linear(1024, 4096, bias=False), torch.nn.Linear(1024, 4096, bias=False)
    first.weight = second.weight = torch.nn.Parameter(weight)
    return torch.nn.Sequential(first, torch.nn.LayerNorm(4096), torch.nn.Linear(4096, 1024), second)


def test_weights_move_in_place(pages):
    net = model(torch.randn(4096, 1024))
    before = {name: (t.clone(), t.data_ptr(), t._version) for name, t in net.state_dict(keep_vars=True).items()}
    moved = exeunt.huge_pages(net)
    assert moved % PAGE == 0 and PAGE <= moved <= 36 << 20  # as many as the system has left
    assert huge_bytes(net) >= moved // 2
    for name, t in net.state_dict(keep_vars=True).items():
        assert torch.equal(t, before[name][0]) and (t.data_ptr(), t._version) == before[name][1:]
    assert exeunt.huge_pages(net) >= moved


def test_weights_mapped_from_a_file_are_copied_and_stay_tied(pages, tmp_path):
    file = tmp_path / "weights"
    weight = torch.randn(2 * 4096, 1024)
    file.write_bytes(weight.numpy().tobytes())
    mapped = torch.from_file(str(file), size=weight.numel()).view(2 * 4096, 1024)
    net = model(mapped[:4096])
    part = torch.nn.Parameter(mapped[4096:].t())  # the rest of the storage, not contiguous
    net.part, old = part, mapped.data_ptr()
    assert exeunt.huge_pages(net) >= PAGE and huge_bytes(net) >= PAGE
    assert net[0].weight.data_ptr() != old and net[0].weight is net[3].weight and net.part is part
    assert torch.equal(net[0].weight, weight[:4096]) and torch.equal(part, weight[4096:].t())
    assert part.stride() == (1, 1024) and part.untyped_storage().data_ptr() == net[0].weight.data_ptr()
    with torch.no_grad():
        net[0].weight[0, 0] = 7.0
    assert net[3].weight[0, 0] == 7.0 and float(mapped[0, 0]) == float(weight[0, 0])
    assert torch.equal(net[1].weight, torch.ones(4096))


def test_an_attached_model_says_the_same(pages, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, vocab_size=2048
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    net = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 2048, (2, 5))
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with exeunt.attach(net, exeunt.recipes.calm(exits=[2], threshold=0.0)) as ee:
        want = net.generate(ids, **options)
        assert exeunt.huge_pages(net) >= PAGE
        assert torch.equal(net.generate(ids, **options), want)
        assert ee.report().fill_ins and not ee.report().captures


@pytest.mark.parametrize("reason", ["refused", "another system"])
def test_where_there_are_none_nothing_is_done(monkeypatch, reason):
    net = model(torch.randn(4096, 1024))
    before = [(t.clone(), t.data_ptr()) for t in net.parameters()]
    if reason == "refused":
        monkeypatch.setattr(memory, "_COLLAPSE", 9999)
    else:
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert exeunt.huge_pages(net) == 0
    for t, (old, at) in zip(net.parameters(), before, strict=True):
        assert torch.equal(t, old) and t.data_ptr() == at


def test_scratch_is_kept_grows_and_is_a_threads_own():
    small = _backend.scratch(100)
    assert _backend.scratch(1 << 20).data_ptr() == small.data_ptr()  # on a page of 2 MB
    large = _backend.scratch(len(small) + 1)
    assert len(large) > len(small) and large.data_ptr() % 64 == 0
    assert _backend.scratch(1).data_ptr() == large.data_ptr()
    once = _backend.scratch((1 << 24) + 1)
    assert len(once) > 1 << 24 and _backend.scratch(1).data_ptr() == large.data_ptr()
    others = []
    thread = threading.Thread(target=lambda: others.append(_backend.scratch(1)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != large.data_ptr()
