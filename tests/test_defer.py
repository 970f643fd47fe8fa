"""Defer, Recompute and Evict against oracles that run everything: whatever happens to the rows and their cache."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import DynamicCache

import exeunt
from exeunt.models import spread
from exeunt.states import Defer, Evict, Propagate, Recompute
from oracle import RunEverything, prompts, tiny_llama
from scripts import Run, assert_same, happenings, keys_and_values

LAYERS, NEW = 6, 12
EXITS, THRESHOLD = [0, 2, 4], 0.3
SKIPPED = {Defer: "full", Recompute: "full", Evict: "nothing"}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(LAYERS)


def recipe_of(state, exits=EXITS, threshold=THRESHOLD, confidence="margin"):
    return dataclasses.replace(exeunt.recipes.calm(exits, threshold, confidence=confidence), state=state)


def generate(model, inputs, new=NEW, **kw):
    torch.manual_seed(3)
    return model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **kw})


def prefilled(model, batch=2):
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + 5 * batch).view(batch, 5), past_key_values=cache)
    return cache


def steps(model, cache, new=6, seed=5, batch=2):
    ids = torch.randint(3, 203, (batch, new), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(new)]


MODES = [{}, dict(num_beams=3), dict(num_beams=2, do_sample=True), dict(do_sample=True)]
STATES = [Defer(), Defer(limit=1), Defer(limit=4), Recompute(), Recompute(limit=3), Evict()]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_gives_the_tokens_of_the_oracle_under_generate(model, state, mode):
    with RunEverything(model, EXITS, "margin", THRESHOLD, SKIPPED[type(state)]) as oracle:
        expected = generate(model, prompts(), past_key_values=(theirs := DynamicCache()), **mode)
    assert oracle.closest > 1e-5 and len({*torch.stack(oracle.depths).flatten().tolist()}) > 1
    with exeunt.attach(model, recipe_of(state)) as early:
        got = generate(model, prompts(), past_key_values=(ours := DynamicCache()), **mode)
    assert torch.equal(got, expected)
    assert not ours.layers[0].state.waiting, "settled at the end of generate"
    beams = mode.get("num_beams", 1)
    depths = [torch.stack(d).reshape(NEW - 1, -1, beams) for d in (early.report().exit_layers, oracle.depths)]
    assert torch.equal(*(d.sort().values for d in depths))  # beams of nearly equal scores may stand in another order
    if beams == 1 and not isinstance(state, Evict):
        for a, b in zip(keys_and_values(ours), keys_and_values(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@given(
    script=st.lists(happenings, min_size=1, max_size=10),
    batch=st.integers(1, 4),
    length=st.integers(4, 8),
    padding=st.lists(st.integers(0, 3), max_size=4),
    exits=st.sets(st.integers(0, LAYERS - 2), min_size=1),
    share=st.sampled_from([0.5, 1.0, 1.5]),
    state=st.sampled_from(STATES),
    seed=st.integers(0, 99),
)
@example([("crop", 1), ("steps", 1), ("crop", 1)], 1, 6, [], {1}, 0.5, Evict(), 0)  # no room yet for the token cropped
@settings(deadline=None, max_examples=60)
def test_whatever_happens_to_the_cache(model, script, batch, length, padding, exits, share, state, seed):
    threshold, script = THRESHOLD * share, [*script, ("steps", 3), ("read",)]
    if isinstance(state, Evict):  # what stands where nothing was kept is nobody's business
        script = [step for step in script if step != ("read",)]
    with RunEverything(model, exits, "margin", threshold, SKIPPED[type(state)]) as oracle:
        theirs = Run(model, batch, length, padding, seed, script)
    assume(oracle.closest > 1e-4)
    with exeunt.attach(model, recipe_of(state, exits, threshold)) as early:
        ours = Run(model, batch, length, padding, seed, script)
        assert_same(early, ours, oracle, theirs)


@pytest.mark.parametrize("state", [Defer(), Recompute(), Evict()], ids=str)
def test_bit_identical_while_nothing_leaves(model, state):
    plain = generate(model, prompts(), return_dict_in_generate=True, output_logits=True)
    with exeunt.attach(model, recipe_of(state, threshold=float("inf"))) as early:
        got = generate(model, prompts(), return_dict_in_generate=True, output_logits=True)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
    assert early.report().layer_rows == early.report().full_layer_rows and not early.report().late_rows


def rows_at_the_mlps(model, run):
    rows, handles = [0] * LAYERS, []
    for i, layer in enumerate(model.model.layers):

        def count(module, args, i=i):
            rows[i] += args[0].shape[0]

        handles.append(layer.mlp.register_forward_pre_hook(count))
    run()
    for handle in handles:
        handle.remove()
    return rows


def test_waiting_tokens_run_once_and_together(model):
    """Exit 1: two tokens of row 0 wait for the third, which goes deep; then nothing waits."""
    leave = iter([[True, False], [True, True], [False, True], [False, False]])

    class Scripted(exeunt.policies.Threshold):
        def step(self, state, seen, at):
            return torch.tensor(next(leave))

    recipe = dataclasses.replace(recipe_of(Defer(), [1]), policy=Scripted(0.5))
    with exeunt.attach(model, recipe) as early:
        cache = prefilled(model)
        counts = []
        for t in range(4):
            counts.append(rows_at_the_mlps(model, lambda t=t: steps(model, cache, new=1, seed=t)))
    assert counts[0] == [2, 2, 1, 1, 1, 1]  # row 1 alone
    assert counts[1] == [2, 2, 0, 0, 0, 0]
    assert counts[2] == [2, 2, 3, 3, 3, 3]  # row 0 with its two
    assert counts[3] == [2, 2, 4, 4, 4, 4]  # both; of row 1 two were left
    report = early.report()
    assert report.late_rows == 4 * (2 + 2) and report.layer_rows == sum(map(sum, counts))
    assert f"{report.late_rows} run late" in str(report)


def test_nothing_runs_for_tokens_that_nobody_waits_for(model):
    with exeunt.attach(model, recipe_of(Defer(), [1], 0.0)) as early:
        cache = prefilled(model)
        assert rows_at_the_mlps(model, lambda: steps(model, cache)) == [12, 12, 0, 0, 0, 0]
        assert cache.layers[0].state.waiting == 6 and cache.get_seq_length(5) == 11
        cache.layers[3].keys  # noqa: B018 (reading runs what waits, through all layers)
        assert not cache.layers[0].state.waiting and early.report().late_rows == 6 * 2 * 4


@pytest.mark.parametrize("state", [Defer(), Recompute()], ids=str)
@pytest.mark.parametrize("where", ["an early layer", "a late layer", "the head"])
def test_a_step_that_fails_and_is_taken_again(model, state, where):
    """What had run along waits again as before the step; the token that failed is cropped off and waits no more."""

    def fail(*args):
        raise RuntimeError("in the middle of a step")

    runs = []
    for failing in (False, True):
        with exeunt.attach(model, recipe_of(state)) as early, torch.no_grad():
            cache, logits = prefilled(model), []
            ids = torch.randint(3, 203, (2, 10), generator=torch.Generator().manual_seed(7))
            for t in range(10):
                step = dict(input_ids=ids[:, t : t + 1], past_key_values=cache)
                layers = model.model.layers
                module = {"an early layer": layers[1].mlp, "a late layer": layers[5].mlp}.get(where, model.model.norm)
                handle = module.register_forward_pre_hook(fail) if failing else None
                length = cache.get_seq_length()
                with contextlib.suppress(RuntimeError):
                    model(**step) if failing else None
                if failing:
                    handle.remove()
                    for layer in cache.layers:
                        if layer.get_seq_length() > length:
                            layer.crop(length - layer.get_seq_length())
                    late = cache.layers[0].state.deferred
                    assert not late.under_way or where == "the head"
                    assert (late.slot < length).all()
                before = len(early.report().exit_layers)
                logits.append(model(**step).logits)
                assert len(early.report().exit_layers) == before + 1
            runs.append((torch.stack(logits), early.report().exit_layers[-1], keys_and_values(cache)))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-3, atol=1e-3)
    for a, b in zip(runs[1][2], runs[0][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_waiting_tokens_are_bounded(model):
    with exeunt.attach(model, recipe_of(Defer(limit=3), [1], 0.0)):
        cache = prefilled(model)
        seen = []
        for t in range(9):
            steps(model, cache, new=1, seed=t)
            seen.append(cache.layers[0].state.waiting)
    assert seen == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_cache_goes_from_one_strategy_to_another(model):
    """What waits is run by the exits that made it wait, before others use the cache."""
    plain = prefilled(model)
    steps(model, plain, seed=5)
    with exeunt.attach(model, recipe_of(Defer(), [1], 0.0)):
        cache = prefilled(model)
        steps(model, cache, seed=5)
        assert cache.layers[0].state.waiting
    with exeunt.attach(model, recipe_of(Propagate(), [3], float("inf"))):
        got = steps(model, cache, seed=6)
    for a, b in zip(got, steps(model, plain, seed=6), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_batch_gives_what_its_rows_give_alone(model):
    given = {k: v[:, 3:] for k, v in prompts(batch=5).items()}
    with exeunt.attach(model, recipe_of(Defer())) as early:
        together = generate(model, given, new=20, return_dict_in_generate=True, output_logits=True)
        depths = torch.stack(early.report().exit_layers, 1)
        for row in range(5):
            early.reset_report()
            own = {k: v[row : row + 1] for k, v in given.items()}
            alone = generate(model, own, new=20, return_dict_in_generate=True, output_logits=True)
            assert torch.equal(alone.sequences[0], together.sequences[row])
            assert torch.equal(torch.stack(early.report().exit_layers, 1)[0], depths[row])
            torch.testing.assert_close(
                torch.stack(alone.logits)[:, 0], torch.stack(together.logits)[:, row], rtol=1e-3, atol=1e-3
            )


def test_rows_that_end_leave_the_others_alone(model):
    model = copy.deepcopy(model)
    with exeunt.attach(model, recipe_of(Defer())) as early:
        free = generate(model, prompts(), new=20)
        stop = int(free[0, 14])
        early.reset_report()
        got = generate(model, prompts(), new=20, eos_token_id=stop, pad_token_id=0)
    for row in range(4):
        ended = (free[row, 9:] == stop).nonzero()[:1].flatten().tolist()
        until = 9 + (ended[0] + 1 if ended else 20)
        assert torch.equal(got[row, :until], free[row, :until])


def test_a_cache_with_waiting_tokens_dies_with_its_last_reference(model):
    gc.disable()
    try:
        with exeunt.attach(model, recipe_of(Defer(), [1], 0.0)):
            cache = prefilled(model)
            steps(model, cache)
            alive = weakref.ref(cache.layers[4])
            assert cache.layers[0].state.waiting
            del cache
            assert alive() is None
    finally:
        gc.enable()


def test_a_decoder_without_its_head_loses_nothing(model):
    """Nobody says that the step has ended: the next one finds what waits all the same."""
    plain, ids = prefilled(model), torch.tensor([[5], [9]])
    with exeunt.attach(model, recipe_of(Defer(), [1], 0.0)) as early:
        cache = prefilled(model)
        with torch.no_grad():
            model.model(input_ids=ids, past_key_values=cache)
            chunk = torch.arange(6).view(2, 3)
            got = model(input_ids=chunk, past_key_values=cache).logits
        assert early.report().late_rows == 2 * 4
    with torch.no_grad():
        model(input_ids=ids, past_key_values=plain)
        torch.testing.assert_close(got, model(input_ids=chunk, past_key_values=plain).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("state", [Defer, Recompute])
def test_bad_limits_get_one_sentence(state):
    with pytest.raises(ValueError, match=f"{state.__name__}: limit must be at least 1, got 0"):
        state(limit=0)


def test_layers_that_cannot_defer_are_refused_at_attach(model):
    """A layer whose output for a token hangs on the batch it runs in."""
    model = copy.deepcopy(model)

    def forward(x, stock=model.model.layers[3].mlp.forward):
        return stock(x) * x.shape[0]

    model.model.layers[3].mlp.forward = forward
    with pytest.raises(ValueError, match="another output for a row of its own"):
        exeunt.attach(model, recipe_of(Defer()))


def test_layers_that_take_no_mask_cannot_evict(model):
    model = copy.deepcopy(model)
    attention = model.model.layers[4].self_attn
    stock = attention.forward

    def forward(*args, attention_mask=None, **kwargs):
        return stock(*args, attention_mask=None, **kwargs)

    attention.forward = forward
    with pytest.raises(ValueError, match="Evict on LlamaForCausalLM attends to keys that were evicted"):
        exeunt.attach(model, recipe_of(Evict()))
    assert "forward" not in vars(model.model.layers[0])  # nothing is left behind


def test_free_learns_its_threshold_from_what_runs_deep(model):
    """Every token that ran at both depths, early or late, is a lesson; a fit before each new sequence uses them all."""
    asked = []

    def estimate(scores, agrees):
        asked.append((scores, agrees))
        return 0.5

    policy = exeunt.policies.Adaptive(estimate, 0.3, sequences=12)
    recipe = dataclasses.replace(exeunt.recipes.free(2, 0.3), policy=policy)
    with exeunt.attach(model, recipe) as early:
        first = generate(model, prompts(), new=20)  # its cache is gone at the end, and what waits there with it
        late = early.report().late_rows // (LAYERS - 3)
        deep = early.report().histogram[LAYERS - 1]
        assert not asked and recipe.policy.threshold == 0.3 and late > 5
        generate(model, prompts(seed=2))
        (scores, agrees), reads = asked[0], early.report().head_reads
        assert recipe.policy.threshold == 0.5 and len(scores) == late + deep
        generate(model, prompts(seed=3))
        assert len(asked) == 2 and len(asked[1][0]) > len(scores)
        for seed in (4, 5):
            generate(model, prompts(seed=seed))
        assert len(asked) == 3, "after so many sequences the threshold stays"
        assert early.report().head_reads > reads

    # the lessons against one forward of the plain model over what was said
    mask = torch.cat([prompts()["attention_mask"], torch.ones(4, 20, dtype=torch.long)], 1)
    with torch.no_grad():
        out = model(
            first, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), output_hidden_states=True
        )
        shallow = model.lm_head(model.model.norm(out.hidden_states[3]))[:, 9:-1].softmax(-1).topk(2, -1)
    right = shallow.indices[..., 0] == out.logits[:, 9:-1].argmax(-1)
    margin = shallow.values[..., 0] - shallow.values[..., 1]
    for score, agree in zip(scores.tolist(), agrees.tolist(), strict=True):
        nearest = (margin - score).abs().argmin()
        assert (margin.flatten()[nearest] - score).abs() < 1e-4 and bool(right.flatten()[nearest]) == agree


def test_an_adaptive_threshold_needs_defer(model):
    recipe = exeunt.recipes.free(2, adaptive=True, state=Propagate())
    with pytest.raises(ValueError, match="expected the state strategy Defer, got Propagate"):
        exeunt.attach(model, recipe)
    with pytest.raises(ValueError, match="expected one exit, got 2"):
        dataclasses.replace(recipe, exits=(1, 2))
    with pytest.raises(ValueError, match="within 0..1, got saturation"):
        exeunt.recipes.free(2, adaptive=True, confidence="saturation")


def test_what_a_layer_hands_on_stays_with_rows_that_left():
    """T5's position bias, where it holds the rows' masks: a row that left at an earlier layer runs on with its own."""
    before, new, rows = torch.arange(12.0).view(4, 3), torch.ones(2, 3), torch.tensor([0, 3])
    (got, shared), want = spread((new, new[:1]), rows, 4, (before, None)), before.clone()
    want[rows] = 1.0
    assert torch.equal(got, want) and torch.equal(shared, new[:1])
    assert torch.equal(spread(new[:1], rows[:1], 4, before)[1:], before[1:])
