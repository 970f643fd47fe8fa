"""The fitting loop: the same bits however often it was stopped, and one sentence for what can go wrong."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exeunt.training import Windows, adamw, fit, loop, schedule
from training import killing


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(path):
    return torch.load(path, weights_only=True)["parameters"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    killing.run(folder)
    return weights(folder / "run")


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, undisturbed, seed):
    script = [sys.executable, killing.__file__, str(tmp_path), str(seed)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().isdecimal(), done.stdout + done.stderr
    assert int(done.stdout) >= 2, "it was not killed often enough to show anything"
    assert same(weights(tmp_path / "run"), undisturbed)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 17, 31, 32, 33, 39])
def test_stopped_at_a_step_it_ends_in_the_same_bits(tmp_path, undisturbed, at, monkeypatch):
    plain = killing.batches

    def stop(step):
        if step == at:
            raise Stopped
        return plain(step)

    monkeypatch.setattr(killing, "batches", stop)
    with pytest.raises(Stopped):
        killing.run(tmp_path)
    monkeypatch.setattr(killing, "batches", plain)
    torch.randn(3)  # somebody else draws
    _, outcome = killing.run(tmp_path)
    assert outcome["steps"] == killing.STEPS
    assert same(weights(tmp_path / "run"), undisturbed)


def test_more_steps_take_the_path_of_having_asked_for_them_at_once(tmp_path, undisturbed):
    killing.run(tmp_path, steps=20)
    assert not same(weights(tmp_path / "run"), undisturbed)
    killing.run(tmp_path)
    assert same(weights(tmp_path / "run"), undisturbed)


def test_the_bits_do_not_depend_on_how_often_it_writes_or_on_the_users_generator(tmp_path, undisturbed):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    net = killing.Net()
    torch.set_rng_state(state)
    fit(net, killing.batches, tmp_path / "run", steps=40, optimizers=loop.muon(net, 0.01), identity={"net": 1},
        pieces=2, warmup=5, every=1e9, progress=False)  # fmt: skip
    assert same(weights(tmp_path / "run"), undisturbed)
    assert torch.equal(torch.get_rng_state(), state), "the user's generator was moved on"


def test_a_finished_run_is_not_run_again(tmp_path):
    _, first = killing.run(tmp_path, steps=5)
    net, again = killing.run(tmp_path, steps=5)
    assert again["steps"] == 5 and again["loss"] == first["loss"]
    assert same(dict(net.named_parameters()), weights(tmp_path / "run"))


def test_another_seed_gives_other_bits(tmp_path, undisturbed):
    killing.run(tmp_path, seed=1)
    assert not same(weights(tmp_path / "run"), undisturbed)


def test_pieces_make_the_same_gradient(tmp_path):
    class Plain(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).square().mean()

    ends = []
    for pieces in (1, 4):
        torch.manual_seed(0)
        net = Plain(3, 2).double()
        fit(net, lambda step: torch.ones(8, 3).double().cumsum(0) / 8, tmp_path / str(pieces), steps=9, warmup=1,
            optimizers=adamw(net, 0.01), identity={}, pieces=pieces, progress=False)  # fmt: skip
        ends.append(net.weight.detach().clone())
    torch.testing.assert_close(*ends)


def test_nan_stops_names_the_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    class Breaks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).mean() * (float("nan") if x[0, 0] == 7 else 1.0)

    net, path = Breaks(2, 1), tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"^the loss of batch 7 of 20 is nan, the checkpoint .*run is kept$"):
        fit(net, lambda step: torch.full((2, 2), float(step)), path, steps=20, optimizers=adamw(net, 0.1),
            identity={}, every=0.0, progress=False)  # fmt: skip
    kept = torch.load(path, weights_only=True)
    assert kept["step"] == 7 and all(p.isfinite().all() for p in kept["parameters"].values())


def test_an_infinite_gradient_does_not_reach_the_weights(tmp_path):
    class Root(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 0).abs().sqrt().sum()

    net = Root(2, 1)
    with pytest.raises(FloatingPointError, match="batch 0 of 3"):
        fit(net, lambda step: torch.ones(1, 2), tmp_path / "run", steps=3, optimizers=adamw(net, 0.1), identity={},
            progress=False)  # fmt: skip
    assert net.weight.isfinite().all()


DISK_FULL = """
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import killing
folder = Path(sys.argv[1])
killing.run(folder, steps=10)
before = (folder / "run").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    killing.run(folder, steps=40)
except OSError as error:
    print(error)
assert (folder / "run").read_bytes() == before
print(sorted(p.name for p in folder.iterdir()))
"""


def test_a_full_disk_keeps_the_old_file(tmp_path):
    here = str(Path(killing.__file__).parent)
    done = subprocess.run([sys.executable, "-c", DISK_FULL, str(tmp_path), here], capture_output=True, text=True)
    sentence, names = done.stdout.strip().splitlines() if done.returncode == 0 else (done.stderr, "")
    assert sentence.endswith("what was there before is kept"), sentence
    assert os.strerror(errno.EFBIG) in sentence
    assert names == "['run', 'run.plateau']"


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    killing.run(tmp_path, steps=5)
    with pytest.raises(ValueError, match=r"run belongs to another run: expected net 1, got 2$"):
        killing.run(tmp_path, steps=5, identity={"net": 2})
    with pytest.raises(ValueError, match=r"belongs to another run: expected seed 0, got 3$"):
        killing.run(tmp_path, steps=5, seed=3)
    with pytest.raises(ValueError, match=r"has gone 5 of 5 steps: expected more than that, got 3$"):
        killing.run(tmp_path, steps=3)
    (tmp_path / "run").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a checkpoint of this version"):
        killing.run(tmp_path, steps=5)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        killing.run(tmp_path, steps=0)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    net = killing.Net()
    first, second = loop.muon(net, 0.01)
    assert [id(p) for p in first.param_groups[0]["params"]] == [id(net.layers[0].weight)]
    assert {id(p) for p in second.param_groups[0]["params"]} == {id(net.embedding.weight), id(net.layers[0].bias)}


def test_schedule_rises_stays_and_falls():
    rates = [schedule(step, 100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72
    assert rates[80:] == pytest.approx([k / 20 for k in range(20, 0, -1)])
    assert schedule(50, 1000, warmup=10) == schedule(50, 100, warmup=10)


def test_windows_come_in_an_order_that_is_a_function_of_the_step():
    tokens = torch.arange(1000).numpy()
    windows, again = Windows(tokens, 10, 4, seed=1), Windows(tokens, 10, 4, seed=1)
    seen = torch.cat([windows(step) for step in range(24)])
    assert torch.equal(windows(7), again(7)) and not torch.equal(windows(7), windows(8))
    assert (seen.diff(dim=1) == 1).all(), "windows are contiguous"
    assert len(set(seen[:, 0].tolist())) == 96, "an epoch reads no window twice"
    assert not torch.equal(windows(0), Windows(tokens, 10, 4, seed=2)(0))


def test_text_that_fills_no_batch_is_refused():
    with pytest.raises(ValueError, match=r"^the data is too short: 4 rows of 10 need 51 tokens, got 50$"):
        Windows(torch.arange(50).numpy(), 10, 4)
    assert Windows(torch.arange(51).numpy(), 10, 4)(0).shape == (4, 11)


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
from exeunt.training import adamw, fit

class Plain(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).square().mean()

torch.manual_seed(0)
net = Plain(3, 2)
fit(net, lambda step: torch.randn(8, 3, generator=torch.Generator().manual_seed(step)), sys.argv[1], steps=9, warmup=1,
    optimizers=adamw(net, 0.01), identity={}, pieces=2, progress=False)
"""


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    pytest.importorskip("accelerate", reason="several processes need accelerate")
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_without_a_fall_the_rate_stays_and_more_steps_go_on_in_the_same_bits(tmp_path):
    assert {schedule(step, 30, warmup=5, fall=0.0) for step in range(4, 30)} == {1.0}
    (tmp_path / "whole").mkdir()
    killing.run(tmp_path / "whole", steps=30, fall=0.0)
    killing.run(tmp_path, steps=17, fall=0.0)
    killing.run(tmp_path, steps=30, fall=0.0)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole" / "run"))
