"""Run as a script: fit a small module in forks of this process, kill them at random moments, go on until it is done.

``python killing.py FOLDER SEED`` prints how often it killed; the checkpoint in FOLDER is then to be compared.
"""

import itertools
import os
import random
import signal
import sys
import tempfile

import torch

from exeunt.training import fit, muon

STEPS = 40


class Net(torch.nn.Module):
    """Dropout, so that a random number out of place would show; a matrix for Muon, the rest for AdamW."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16)])

    def forward(self, ids):
        h = torch.nn.functional.dropout(self.layers[0](self.embedding(ids)), 0.3, self.training)
        return (h @ self.embedding.weight.T).flatten(0, 1).logsumexp(-1).mean()


def batches(step):
    return torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(step))


def run(folder, steps=STEPS, every=0.0, **more):
    net = Net()
    torch.seed()  # what the user's generator is at must not matter
    options = dict(identity={"net": 1}, pieces=2, warmup=5, every=every, progress=False)
    return net, fit(net, batches, f"{folder}/run", steps=steps, optimizers=muon(net, 0.01), **options | more)


def doomed(steps, delay):
    """`batches`, whose steps-th call sets the moment of the fork's death, `delay` seconds on, without goodbye."""
    plain, calls = batches, itertools.count(1)

    def wrapped(step):
        if next(calls) == steps:
            signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM, which nobody handles
        return plain(step)

    return wrapped


def main(folder, seed):
    global batches
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as elsewhere:
        run(elsewhere, steps=1)  # imports what is imported late, once instead of in every fork
    chance, kills = random.Random(seed), 0
    while True:
        # In steps, so that a slow machine does not change how often; the delay decides where in a step.
        steps, delay = chance.randint(2, 10), chance.uniform(1e-5, 5e-3)
        child = os.fork()
        if not child:
            batches = doomed(steps, delay)
            run(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(kills if status == 0 else f"failed with {status}")
            return
        kills += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
