"""R2R's router on a pair: a net that tells whether the SLM's token would lead the reasoning astray.

    python -m analysis.train_r2r             pocket pair; labels first, if `analysis.label` has not been run
    P="--slm SMALL --llm LARGE --problems file.jsonl"
    python -m analysis.train_r2r $P --judge JUDGE --labels labels --out router

Rows: log.jsonl of the folder of checkpoints; made.json and router.png beside the finished router.
Feeds: the results page's paragraph on the router, and `analysis.compare`.

Trained as in arXiv 2505.21600: BCE weighted by #negative / #positive, AdamW, early stopping on dev problems.
The threshold is chosen on the calibration split alone: the highest score that still finds --recall of the
divergent tokens there. All figures are of the test split, and offline: they stand on the LLM's trajectories,
where the labels are. `python -m analysis.compare` runs the router. An epoch's weights are saved when it ends;
a run that was killed goes on from there as if nothing had happened.
"""
import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import rstitch
from analysis import label
from analysis.instruments.checkpoints import CHECKPOINTS, load_checkpoint, resume, save_checkpoint
from analysis.instruments.options import add_options, given, option
from analysis.instruments.progress import progress, tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import append_row, read_rows, write_rows
from analysis.instruments.runs import settle
from analysis.instruments.stats import auroc, bootstrap, ratio_of_means
from analysis.instruments.task import common_vocab
from analysis.pocket.weights import MODELS
from rstitch import fingerprint
from rstitch_hf.ranks import start

FOLDER = CHECKPOINTS / "r2r"
ROUTER = MODELS / "r2r"
USAGES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Config:
    """A training run; the defaults are the paper's. Everything but the machine's rounding follows from it and
    the labels."""

    top_k: int = option(100, "largest logits that the net sees")
    width: int = option(1024, "of the net")
    blocks: int = option(6, "residual blocks of the net")
    dropout: float = option(0.1, "in the blocks, in [0, 1)")
    lr: float = option(5e-5, "learning rate of AdamW")
    weight_decay: float = option(5e-4, "of AdamW")
    batch: int = option(1024, "tokens per step")
    epochs: int = option(50, "passes over the labels at most")
    patience: int = option(10, "epochs without a lower dev loss before it stops")
    recall: float = option(0.95, "share of the calibration split's divergent tokens that the stored "
                                 "threshold finds, in (0, 1]")
    seed: int = option(0, "of initial weights, order and dropout")

    def __post_init__(self):
        for name in ("top_k", "width", "batch", "epochs", "patience"):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        rstitch.check_count("--blocks", self.blocks, least=0)
        for name, low, high in (("dropout", 0, 1), ("lr", 0, 1), ("weight_decay", 0, 1)):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number in "
                                 f"[{low}, {high})")
        if not 0 < self.recall <= 1:
            raise ValueError(f"--recall {self.recall}: expected a share in (0, 1]")


POCKET = Config(width=64, blocks=2, lr=1e-3)


@dataclass
class Tokens:
    """The answer tokens of some problems, N of them: what the net sees, and their labels."""

    hidden: torch.Tensor  # (N, D) of the SLM
    top: torch.Tensor  # (N, top_k) its largest logits, sorted
    token: torch.Tensor  # (N,) its choice
    label: np.ndarray  # (N,) 1 divergent, 0 not, NaN unjudged
    problem: np.ndarray  # (N,) index of the problem
    place: np.ndarray  # (N,) in the answer, 0 to 1

    def batch(self, index: torch.Tensor, device) -> tuple[torch.Tensor, ...]:
        return tuple(x[index].to(device) for x in (self.hidden, self.top, self.token))


def digest(content) -> str:
    """Tells one content from another."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def features(slm, vocab: int, rows: list[dict], top_k: int, path: Path) -> Tokens:
    """Read the answers once more, teacher forced. The tensors live in files beside `path`, so they may be
    larger than memory; a run that was killed goes on with the problem that it had reached."""
    ends = np.cumsum([0] + [len(row["answer"]) for row in rows])
    N, D = int(ends[-1]), slm.config.get_text_config(decoder=True).hidden_size
    path.parent.mkdir(parents=True, exist_ok=True)
    on_disk = lambda name, width, dtype: torch.from_file(str(path.with_suffix(f".{name}")), True, N * width,
                                                         dtype=dtype).view(N, width)  # noqa: E731
    hidden, top, token = on_disk("hidden", D,
                                 slm.dtype), on_disk("top", top_k,
                                                     torch.float32), on_disk("token", 1, torch.int64)[:, 0]
    whose = {"slm": fingerprint(slm), "dtype": str(slm.dtype), "top_k": top_k, "tokens": N, "vocab": vocab,
             "answers": digest([[r["prompt"], r["answer"]] for r in rows])}
    known = read_rows(path)
    done = known[0].pop("done") if known else 0
    if not known or known[0] != whose:
        done = 0
        write_rows(path, [whose | {"done": 0}])  # before anything of another run is overwritten
    for i in tracked(range(done, len(rows)), path.stem, "problem"):
        at = ends[i]
        for h, logits in label.teacher_forced(slm, rows[i]["prompt"], rows[i]["answer"]):
            logits = logits[:, :vocab].float()
            here = slice(at, at := at + len(h))
            hidden[here], top[here], token[here] = (h.cpu(), logits.topk(top_k).values.cpu(),
                                                    logits.argmax(-1).cpu())
        if (i + 1) % 100 == 0 or i + 1 == len(rows):
            write_rows(path, [whose | {"done": i + 1}])
    letters = np.array(list("".join(row["labels"] for row in rows)))
    return Tokens(hidden, top, token, np.select([letters == "D", letters == "U"], [1.0, np.nan], 0.0),
                  np.repeat(np.arange(len(rows)), np.diff(ends)),
                  np.concatenate([np.arange(len(row["answer"])) / len(row["answer"]) for row in rows]))


def build_net(config: Config, slm) -> rstitch.R2RNet:
    """Untrained; the same for the same config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return rstitch.R2RNet(rstitch.hidden_size_of(slm), slm.get_input_embeddings(), config.top_k,
                              config.width,
                              config.blocks, config.dropout).to(slm.device)


@torch.inference_mode()
def scores(net, tokens: Tokens, batch: int = 8192) -> np.ndarray:
    """(N,) sigmoid of the net's logits."""
    device = net.head.weight.device
    net.eval()
    return torch.cat([net(*tokens.batch(index, device)).float().sigmoid().cpu()
                      for index in torch.arange(len(tokens.token)).split(batch)]).numpy()


def weighted_bce(score: np.ndarray, y: np.ndarray, positive: float) -> float:
    """Mean of the loss that is trained, from scores."""
    p = np.clip(score.astype(float), 1e-7, 1 - 1e-7)
    return float(np.mean(np.where(y == 1, -positive * np.log(p), -np.log(1 - p))))


def train_epoch(net, optimizer, data: Tokens, known: torch.Tensor, positive: float, batch: int,
                seed: int) -> float:
    """One pass over the judged tokens, indices (N,); the mean loss. `positive`: weight of a divergent
    token."""
    device, y, total = net.head.weight.device, torch.from_numpy(data.label), 0.0
    net.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for index in known[torch.randperm(len(known))].split(batch):
            logit = net(*data.batch(index, device))
            weight = torch.tensor(positive).to(logit)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, y[index].to(logit),
                                                                        pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
    return total / len(known)


def train(config: Config, slm, data: Tokens, dev: Tokens, folder: Path) -> rstitch.R2RNet:
    """The net of the epoch with the lowest dev loss. ValueError where the folder holds a run of another
    config."""
    world = {"config": asdict(config), "slm": fingerprint(slm), "dtype": str(slm.dtype),
             "labels": digest([[float(x) for x in np.nan_to_num(part.label, nan=-1)]
                               for part in (data, dev)])}
    settle(folder, world, "a run")
    known = torch.from_numpy(np.flatnonzero(~np.isnan(data.label)))
    if not 0 < data.label[known].sum() < len(known):
        raise ValueError(f"the labels have {int(data.label[known].sum())} divergent tokens of {len(known)}: "
                         "expected some of both kinds")
    positive = float((data.label[known] == 0).sum() / (data.label[known] == 1).sum())
    net = build_net(config, slm)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = resume(folder, net, optimizer, "epoch")
    losses = [row["dev_loss"] for row in read_rows(folder / "log.jsonl")]
    judged = ~np.isnan(dev.label)
    with progress(config.epochs, "epochs", initial=first) as bar:
        for epoch in range(first, config.epochs):
            if losses and len(losses) - 1 - int(np.argmin(losses)) >= config.patience:
                break
            start, seed = time.perf_counter(), config.seed * 1000 + epoch
            loss = train_epoch(net, optimizer, data, known, positive, config.batch, seed)
            losses.append(weighted_bce(scores(net, dev)[judged], dev.label[judged], positive))
            if losses[-1] == min(losses):
                save_checkpoint(folder / "best.safetensors", net, optimizer, epoch + 1)
            append_row(folder / "log.jsonl", {"epoch": epoch, "loss": loss, "dev_loss": losses[-1],
                                              "seconds": time.perf_counter() - start})
            save_checkpoint(folder / "last.safetensors", net, optimizer, epoch + 1)
            bar.set_postfix_str(f"loss {loss:.4f} | dev loss {losses[-1]:.4f}, lowest {min(losses):.4f}",
                                refresh=False)
            bar.update()
    load_checkpoint(folder / "best.safetensors", net)
    return net.eval()


# ---- figures ----------------------------------------------------------------------------------------------


def average_precision(score: np.ndarray, y: np.ndarray) -> float:
    """Area under precision against recall, tied scores taken together."""
    order = np.argsort(-score, kind="stable")
    # the last token of each run of equal scores
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    found = np.cumsum(y[order])[last]
    return float((np.diff(found, prepend=0) * found / (last + 1)).sum() / y.sum())


def evaluate(score: np.ndarray, tokens: Tokens, calibration: np.ndarray, threshold: float) -> dict:
    """Figures of the scores of the test split; `calibration`: scores of the calibration split, which decide
    every threshold."""
    judged = ~np.isnan(tokens.label)
    s, y = score[judged], tokens.label[judged].astype(int)
    grid = np.quantile(s, np.linspace(0, 1, 201))[::-1]
    n = tokens.problem.max() + 1
    over_problems = lambda mask, of: bootstrap(ratio_of_means, np.bincount(tokens.problem[of & mask],
                                                                           minlength=n),  # noqa: E731
                                               np.bincount(tokens.problem[of], minlength=n))
    called, divergent = score >= threshold, np.nan_to_num(tokens.label) == 1
    bins = np.minimum((10 * s).astype(int), 9)
    return {
        "auroc": auroc(s, y), "average_precision": average_precision(s, y), "divergent": float(y.mean()),
        "roc": [[float((s[y == 0] >= t).mean()), float((s[y == 1] >= t).mean())] for t in grid],
        "precision_recall": [[float(y[s >= t].mean()), float((s[y == 1] >= t).mean())] for t in grid],
        "recall_usage": [[float(t), float((score >= t).mean()), float((s[y == 1] >= t).mean())]
                         for t in grid],
        "threshold": threshold,
        "usage": [float(called.mean()), *over_problems(called, np.ones(len(score), bool))],
        "recall": [float(called[divergent].mean()), *over_problems(called, divergent)],
        "targets": [[u, t := rstitch.calibrate_threshold(calibration, target_usage=u),
                     float((score >= t).mean())] for u in USAGES],
        "usage_by_decile": [float(called[np.minimum((10 * tokens.place).astype(int), 9) == d].mean())
                            for d in range(10)],
        "reliability": [[float(s[bins == b].mean()), float(y[bins == b].mean()), int((bins == b).sum())]
                        for b in range(10) if (bins == b).any()],
    }


def show(made: dict) -> str:
    r = made["test"]
    percent = lambda x: "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in x))  # noqa: E731
    lines = [f"test split, offline: {r['problems']} problems, {r['tokens']} tokens, "
             f"{100 * r['divergent']:.2f} % of them divergent; intervals 95 %, over problems",
             f"AUROC {r['auroc']:.4f}, average precision {r['average_precision']:.3f} (higher is better); "
             f"the SLM's entropy alone: {r['entropy']['auroc']:.4f}, {r['entropy']['average_precision']:.3f}",
             f"threshold {r['threshold']:.4g}, which finds {100 * made['config']['recall']:g} % of the "
             "divergent tokens of the calibration split: "
             f"recall {percent(r['recall'])} at usage {percent(r['usage'])}; the entropy at that rule: "
             f"recall {100 * r['entropy']['recall'][0]:.1f} % "
             f"at usage {100 * r['entropy']['usage'][0]:.1f} %",
             "usage wanted, % -> on test, %: " + ", ".join(f"{100 * u:g} -> {100 * got:.2f}"
                                                           for u, _, got in r["targets"]),
             "usage by tenth of the answer, %: " + " ".join(f"{100 * u:.1f}" for u in r["usage_by_decile"]),
             "reliability, score -> divergent: " + ", ".join(f"{a:.2f} -> {b:.2f} (n = {n})"
                                                             for a, b, n in r["reliability"]),
             f"{made['parameters']} parameters, epoch {made['epoch']}, {made['minutes']:.1f} minutes; seed "
             f"{made['seed']}, {made['device']}, {made['dtype']}, torch {made['torch']}"]
    return "\n".join(lines)


def plot(made: dict, path: Path) -> None:
    """Precision and recall, recall against usage, reliability, and usage by place; the entropy beside the
    net."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    (pr, usage), (reliability, place) = axes
    for name, r, colour in (("R2R's router", made["test"], "#009E73"),
                            ("SLM entropy", made["test"]["entropy"], "#0072B2")):
        pr.plot(*zip(*[(recall, precision) for precision, recall in r["precision_recall"]]), color=colour,
                label=f"{name}, area {r['average_precision']:.2f}")
        usage.plot(*zip(*[(100 * u, 100 * recall) for _, u, recall in r["recall_usage"]]), color=colour,
                   label=name)
        place.plot(range(1, 11), [100 * u for u in r["usage_by_decile"]], "o-", color=colour, label=name)
    reliability.plot(*zip(*[(s, y) for s, y, _ in made["test"]["reliability"]]), "o-", color="#009E73")
    reliability.plot([0, 1], [0, 1], color="grey", lw=0.8)
    usage.axhline(100 * made["config"]["recall"], color="grey", lw=0.8)
    pr.set(xlabel="recall of divergent tokens (higher is better)", ylabel="precision (higher is better)",
           title="Precision and recall")
    usage.set(xlabel="tokens sent to the LLM (%), lower is better",
              ylabel="divergent tokens found (%), higher is better", title="Recall against usage",
              xscale="log")
    reliability.set(xlabel="score", ylabel="share that is divergent",
                    title="Reliability (the loss weighs divergent tokens, so scores are high)")
    place.set(xlabel="tenth of the answer", ylabel="tokens sent to the LLM (%)",
              title=f"Usage by place, at recall {made['config']['recall']:g}")
    for axis in (pr, usage, place):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- export -----------------------------------------------------------------------------------------------


def export(config: Config, net, pair, folder: Path, target: Path, test: dict, threshold: float,
           problems: dict, seed_row: dict) -> dict:
    """Write the router as safetensors, and how it was made beside it. The SLM's embedding stays with the
    SLM."""
    log = read_rows(folder / "log.jsonl")
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in net.named_parameters()},
              target / "router.safetensors")
    made = {"slm": fingerprint(pair[0]), "llm": fingerprint(pair[1]), "hidden_size": net.hidden_size,
            "top_k": net.top_k, "config": asdict(config),
            "threshold": threshold,
            "calibrated": f"recall {config.recall:g} on {problems['calibration']} calibration problems, "
                          "offline",
            "problems": problems, "parameters": sum(p.numel() for p in net.parameters()),
            "epoch": int(np.argmin([row["dev_loss"] for row in log])),
            "minutes": sum(row["seconds"] for row in log) / 60,
            "curve": [[row["loss"], row["dev_loss"]] for row in log], "test": test, **seed_row}
    (target / "made.json").write_text(json.dumps(made) + "\n")
    return made


def run(config: Config, settings: label.Settings, rows: list[dict], folder: Path, target: Path) -> dict:
    """Features, training, threshold, figures and export, from labelled rows."""
    pair = settings.load()
    slm, vocab = pair[0], common_vocab(pair)
    parts = {split: [row for row in rows if row["split"] == split] for split in label.SIZES}
    if config.top_k > vocab:
        raise ValueError(f"--top-k {config.top_k}: expected at most the {vocab} tokens that both models know")
    for split, chosen in parts.items():
        letters = "".join(row["labels"] for row in chosen)
        if "D" not in letters or not set("IN") & set(letters):
            raise ValueError(f"the {split} problems, {len(chosen)}, have {letters.count('D')} divergent "
                             f"tokens of {len(letters)}: expected some of both kinds; label more problems")
    tokens = {split: features(slm, vocab, chosen, config.top_k, folder / f"features-{split}")
              for split, chosen in parts.items()}
    net = train(config, slm, tokens["router-train"], tokens["dev"], folder)
    calibration, score = scores(net, tokens["calibration"]), scores(net, tokens["test"])
    y = tokens["calibration"].label
    rule = lambda s: rstitch.calibrate_threshold(s[~np.isnan(y)], y[~np.isnan(y)].astype(int),
                                                 min_recall=config.recall)  # noqa: E731
    threshold = rule(calibration)
    entropies = {split: np.concatenate([row["entropy"] for row in parts[split]])
                 for split in ("calibration", "test")}
    # normalised: in [0, 1], as scores are
    entropies = {split: H / np.log(vocab) for split, H in entropies.items()}
    test = evaluate(score, tokens["test"], calibration, threshold) | {"problems": len(parts["test"]),
                                                                      "tokens": len(score)}
    test["entropy"] = evaluate(entropies["test"], tokens["test"], entropies["calibration"],
                               rule(entropies["calibration"]))
    return export(config, net, pair, folder, target, test, threshold,
                  {split: len(chosen) for split, chosen in parts.items()},
                  provenance(config.seed, len(parts["test"]), settings.device, settings.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_options(parser, label.Settings, "labels: ")
    add_options(parser, Config, **{"for the pocket pair": POCKET})
    add("--problems", type=Path, 
        help="labels: JSONL file of questions, or a data set as REPO:CONFIG:PART (default: the pocket "
             "domain)")
    add("--n", type=int,
        help="labels: router-train problems of the pocket domain, and of the other splits a share (default: "
             "2000)")
    add("--labels", type=Path, default=label.FOLDER,
        help="labels: their folder; what is missing there is made (default: %(default)s)")
    add("--workers", type=int, default=1, help="labels: processes, on a CPU (default: %(default)s)")
    add("--run", type=Path, default=FOLDER, help="folder of checkpoints (default: %(default)s)")
    add("--out", type=Path, default=ROUTER, help="folder of the finished router (default: %(default)s)")
    args = parser.parse_args()
    try:
        settings = label.Settings(**given(args, label.Settings))
        pocket = (settings.slm, settings.llm, args.problems) == (label.Settings.slm, label.Settings.llm, None)
        if not pocket and ROUTER in (args.out, args.run.resolve()):
            raise ValueError(f"--out {args.out} is the pocket pair's router: expected another folder for "
                             "another pair or other problems")
        config = replace(POCKET if pocket else Config(), **given(args, Config))
        rstitch.check_count("--workers", args.workers)
        rows = label.make_labels(settings, label.problems_of(settings, args.problems, args.n), args.labels,
                                 args.workers)
        made = run(config, settings, rows, args.run, args.out)
        plot(made, args.out / "router.png")
        print(show(made))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main)
