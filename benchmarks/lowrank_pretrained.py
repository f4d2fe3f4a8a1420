"""Pretrained models after low-rank substitution without fine-tuning, on data that nothing was fitted to.

    python -m benchmarks.lowrank_pretrained              both models, into benchmarks/results/lowrank_pretrained.json
    python -m benchmarks.lowrank_pretrained --table      the table in docs/lowrank.md alone

MiniLM, a sentence encoder (mean of the last hidden states, of length one), is brought to 70 % of the parameters of its
linear layers. Sentences are the examples of WordNet's entries (Debian's `wordnet-base`), calibration and test are of
other entries. `cosine` is that between the embeddings before and after; `order` the rank correlation of the cosines of
all pairs of test sentences before and after, `neighbour` in how many the nearest other sentence is the same one, and
`pairs` in how many the other example of an entry is nearer than a sentence of another (`original`: without a change).

EfficientNet-Lite0 is brought to parts of its parameters. `agreement` is in how many test images (CIFAR-10's test part,
enlarged) the first class out of 1000 stays, `photos` that for scikit-image's and scikit-learn's photos. It is
calibrated with images of the training part.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt as go
from benchmarks import corpora
from benchmarks.efficientnet_lite import photo, pretrained
from benchmarks.images import images
from benchmarks.lowrank_table import PAGE, PRETRAINED, page
from benchmarks.machine import commit, machine, versions
from benchmarks.torchvision_ops import define_missing

METHODS = {
    "low-rank": "",
    "low-rank, two factors": ",forms=linear;kxk-1x1;1xk-kx1;kx1-1xk;1x1-kxk",
    "low-rank, activation": ",solver=activation",
    "low-rank, not refitted": ",refit=false",
    "plain SVD": ",solver=svd,forms=linear;kxk-1x1",
    "ALDS": ",allocation=alds",
}
PHOTOS = ("coffee", "chelsea", "flower", "china")
KEPT = 0.7
CALIBRATION, BATCH = 1024, 32


def entries() -> list[list[str]]:
    """The example sentences of five words or more, of every entry that has one."""
    folder = platformdirs.user_cache_path("graphopt") / "wordnet"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for command in (["apt-get", "download", "-qq", "wordnet-base"], ["sh", "-c", "dpkg-deb -x *.deb ."]):
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=900)
            (Path(scratch) / "usr" / "share" / "wordnet").rename(folder)
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if not line.startswith("  "):
                quoted = re.findall(r'"([^"]+)"', line.split(" | ", 1)[1])
                found.append([one for one in quoted if len(one.split()) >= 5])
    return [one for one in found if one]


class Encoder(nn.Module):
    """Token ids and mask to sentence embeddings [sentences, features] of length one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        net.pooler = None  # type: ignore[assignment]  # not part of the encoder
        self.net = net

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def minilm() -> tuple[nn.Module, Callable[[Sequence[str]], list[tuple[Tensor, Tensor]]]]:
    """The encoder, and what makes batches of sentences of similar length."""
    define_missing()
    from transformers import AutoModel, AutoTokenizer

    folder = corpora.path("minilm").parent
    for part in ("minilm-config", "minilm-tokenizer", "minilm-tokenizer-config"):
        corpora.path(part)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def batches(sentences: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        parts = [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]
        made = [tokenizer(list(part), padding=True, return_tensors="pt") for part in parts]
        return [(one["input_ids"], one["attention_mask"]) for one in made]

    return Encoder(AutoModel.from_pretrained(folder, local_files_only=True)).eval(), batches


def embeddings(call: Callable[..., Tensor], batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([call(*batch) for batch in batches])


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def compared(found: Tensor, wanted: Tensor, pairs: int) -> dict[str, float]:
    """Of embeddings, the first `pairs` of which are of one entry in twos."""
    alike = [(one @ one.T).fill_diagonal_(-1) for one in (found, wanted)]
    upper = torch.triu(torch.ones_like(alike[0], dtype=torch.bool), 1)
    orders = torch.stack([ranks(one[upper]) for one in alike])
    first = torch.arange(0, pairs, 2)
    cosine = (found * wanted).sum(1)

    def told_apart(one: Tensor) -> float:
        """The other example of an entry is nearer than one of the next entry."""
        return float((one[first, first + 1] > one[first, (first + 3) % pairs]).float().mean())

    return {
        "cosine": float(cosine.mean()),
        "least cosine": float(cosine.min()),
        "order": float(torch.corrcoef(orders)[0, 1]),
        "neighbour": float((alike[0].argmax(1) == alike[1].argmax(1)).float().mean()),
        "pairs": told_apart(alike[0]),
        "original pairs": told_apart(alike[1]),
    }


def sentences() -> tuple[list[str], list[str], int]:
    """For calibration, and for the test; of the test ones how many are of one entry in twos."""
    drawn = entries()
    random.Random(0).shuffle(drawn)
    twos = [one[:2] for one in drawn if len(one) > 1][:100]
    ones = [one[:1] for one in drawn if len(one) == 1][:200]
    tested = [sentence for part in (*twos, *ones) for sentence in part]
    known = {*tested}
    others = [one[0] for one in drawn if not known & {*one}]
    return sorted(others[:CALIBRATION], key=len), tested, 2 * len(twos)


def encoder_rows(methods: Sequence[str]) -> dict[str, Any]:
    net, batches = minilm()
    learned, tested, pairs = sentences()
    calib, test = batches(learned), batches(tested)
    model = go.capture(net, calib[0], dynamic={0: {0: "batch", 1: "length"}, 1: {0: "batch", 1: "length"}})
    linear = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))
    whole = sum(p.numel() for p in net.parameters())
    part = 1 - (1 - KEPT) * linear / whole
    wanted = embeddings(model, test)
    rows = {}
    for method in methods:
        start = time.perf_counter()
        text = f"low-rank{{params={part:.6f}{METHODS[method]}}}"
        small = go.run(model, text, calib=calib, check=False)[0]
        seconds = time.perf_counter() - start
        left = 1 - (whole - sum(p.numel() for p in small.parameters())) / linear
        rows[method] = {"linear": left, "seconds": seconds} | compared(embeddings(small, test), wanted, pairs)
        print("minilm", method, rows[method], flush=True)
    return {"calibration": len(learned), "tested": len(tested), "rows": rows}


def wide(x: Tensor) -> Tensor:
    """Of deviation one half, as the net was trained with, (pixel - 127) / 128, and as large."""
    return 0.5 * functional.interpolate(x, size=(224, 224), mode="bicubic")


def image_rows(methods: Sequence[str], parts: Sequence[float]) -> dict[str, Any]:
    data = images("cifar10")
    photos = torch.cat([photo(corpora.path(name)) for name in PHOTOS])
    calib = [(wide(part),) for part in data.train[:128].split(16)]
    test = [wide(part) for part in data.test[:400].split(50)]
    net = pretrained()
    model = go.capture(net, (photos[:2],), dynamic={"x": {0: "batch"}})
    model = go.run(model, "exact")[0]
    wanted = embeddings(model, [(x,) for x in test]).argmax(1)
    named = model(photos).argmax(1)
    rows: dict[str, Any] = {}
    for part in parts:
        for method in methods:
            start = time.perf_counter()
            text = f"low-rank{{params={part}{METHODS[method]}}}"
            small = go.run(model, text, calib=calib, check=False)[0]
            seconds = time.perf_counter() - start
            same = embeddings(small, [(x,) for x in test]).argmax(1) == wanted
            with torch.no_grad():
                kept = int((small(photos).argmax(1) == named).sum())
            row = {"seconds": seconds, "agreement": float(same.float().mean()), "photos": kept}
            rows.setdefault(str(part), {})[method] = row
            print("efficientnet-lite0", part, method, row, flush=True)
    return {"calibration": 128, "tested": len(wanted), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["minilm", "efficientnet"], choices=["minilm", "efficientnet"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--parts", nargs="*", type=float, default=[0.8])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.table:
        found = json.loads(PRETRAINED.read_text()) if PRETRAINED.exists() else {}
        if "minilm" in options.models:
            found["minilm"] = encoder_rows(options.methods)
        if "efficientnet" in options.models:
            found["efficientnet"] = image_rows(options.methods, options.parts)
        found |= {"machine": machine(), "versions": versions("transformers"), "commit": commit()}
        PRETRAINED.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
