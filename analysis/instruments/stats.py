"""Intervals, frontiers and tables, without torch: what figures need."""
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float, float]  # a figure and its 95 % interval

PAPER_LABELS = {"identical": 0.89, "neutral": 0.06, "divergent": 0.05}  # R2R, section 3


def kind_of(text: str) -> str:
    """Of a token: digit, word, sign, space, or end (shown as nothing)."""
    bare = text.strip()
    return ("end" if not text else "space" if not bare else "digit" if bare.isdigit() else "word"
            if bare.isalpha() else "sign")


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share k / n."""
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def bootstrap(statistic, *samples: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of statistic(*samples), problems (the common index of the samples) drawn with
    replacement."""
    rng, arrays = np.random.default_rng(seed), [np.asarray(s) for s in samples]
    picks = (rng.integers(0, len(arrays[0]), len(arrays[0])) for _ in range(draws))
    low, high = np.nanpercentile([statistic(*(a[i] for a in arrays)) for i in picks], [2.5, 97.5])
    return float(low), float(high)


def by_problem(rows: Iterable[dict], first: int = 0) -> dict[int, list[dict]]:
    """Answers of each problem from `first` on."""
    problems: dict[int, list[dict]] = {}
    for row in rows:
        if row["problem"] >= first:
            problems.setdefault(row["problem"], []).append(row)
    return problems


def share_of(rows: list[dict], field: str) -> Interval:
    """Share of answers of which the field holds: Wilson, or bootstrapped over problems where one has several
    answers, which are alike."""
    problems = [np.mean([bool(row[field]) for row in answers]) for answers in by_problem(rows).values()]
    if len(problems) < len(rows):
        return float(np.mean(problems)), *bootstrap(np.mean, problems)
    return float(np.mean(problems)), *wilson(round(sum(problems)), len(problems))


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.sum() / b.sum())


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN where one class is
    empty."""
    positive = np.asarray(positive, bool)
    n, m = positive.sum(), (~positive).sum()
    if not n or not m:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def net_time(row: dict, ms: dict[str, float]) -> float:
    """Milliseconds per problem that a router's own net takes, from those of one decision."""
    return row["asked"] * ms.get(row["family"], 0.0)


def by_draw(rows: list[dict], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(LLM share, accuracy) of k runs, (draws, k) each, for weights (draws, n) of the problems."""
    # (k, n) each
    right, tokens, large = (np.array([[o[k] for o in r["outcomes"][:weights.shape[1]]] for r in rows], float)
                            for k in (0, 1, 2))
    return weights @ large.T / (weights @ tokens.T), weights @ right.T


def on_line(target: np.ndarray, shares: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """(draws,) accuracy at exactly these LLM shares (draws,), on the line between the neighbouring of k runs
    (draws, k). NaN where no run has as large a share."""
    out = []
    for x, share, accuracy in zip(target, shares, accuracies):
        order = np.argsort(share, kind="stable")
        out.append(np.interp(x, share[order], accuracy[order], right=accuracy[order][-1]
                             if x <= share.max() + 0.005 else np.nan))
    return np.array(out)


def at_share(rows: list[dict], target: float, weights: np.ndarray) -> np.ndarray:
    """(draws,) accuracy of one family at exactly this LLM share, by `on_line`, for weights (draws, n) of the
    problems."""
    return on_line(np.full(len(weights), target), *by_draw(rows, weights))


def draws_of(n: int, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """(1 + draws, n) weights of n problems: all alike, then bootstrap samples."""
    return np.vstack([np.full(n, 1 / n),
                      np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws) / n])


def in_points(delta: np.ndarray) -> tuple[float, float, float]:
    """A difference of accuracies over `draws_of`, in percentage points, with its 95 % interval, or NaN."""
    if np.isnan(delta[0]):
        return (np.nan,) * 3
    return float(100 * delta[0]), *(100 * np.nanpercentile(delta[1:], [2.5, 97.5])).tolist()


def difference(a: list[dict], b: list[dict], target: float, n: int, draws: int = 1000,
               seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of family a minus that of b at the same share, over the first n problems, in percentage
    points, with a paired 95 % interval."""
    weights = draws_of(n, draws, seed)
    return in_points(at_share(a, target, weights) - at_share(b, target, weights))


def at_own_share(run: dict, family: list[dict], n: int, draws: int = 1000,
                 seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of one run minus that of a family at the run's share, which is another one in every draw;
    otherwise as `difference`."""
    shares, accuracies = by_draw([run, *family], draws_of(n, draws, seed))
    return in_points(accuracies[:, 0] - on_line(shares[:, 0], shares[:, 1:], accuracies[:, 1:]))


def with_interval(x: Sequence[float], unit: str = "", digits: int = 3) -> str:
    return f"{x[0]:.{digits}f}{unit} [{x[1]:.{digits}f}, {x[2]:.{digits}f}]"


def signed(x: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """A difference and its interval."""
    return "{:+.{d}f}{u} [{:+.{d}f}, {:+.{d}f}]".format(*x, d=digits, u=unit)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns as wide as their widest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def outcomes_of(rows: list[dict], n: int | None = None) -> np.ndarray:
    """(methods, problems, 2): right or wrong and milliseconds, of the first n problems."""
    return np.array([[(o[0], o[-1]) for o in r["outcomes"][:n]] for r in rows], float)


def cross(u: np.ndarray, v: np.ndarray) -> float:
    return u[0] * v[1] - u[1] * v[0]


def front(points: np.ndarray, mixtures: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy, latency) of the vertices, both rising: of the points, (k, 2), those that none beats in both;
    with mixtures only those on the lower convex hull."""
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], -points[:, 0]))]:  # from the most accurate down
        if kept and point[1] >= kept[-1][1]:
            continue  # no faster than one that is more accurate
        while mixtures and len(kept) > 1 and cross(kept[-1] - kept[-2], point - kept[-2]) >= 0:
            kept.pop()  # above the chord of its neighbours
        kept.append(point)
    x, y = np.array(kept[::-1]).T
    return x, y


def frontier_gap(method: tuple[float, float], points: np.ndarray, mixtures: bool = False) -> float:
    """1 - latency / latency of the front at equal accuracy, of an (accuracy, latency). Beyond the ends the
    end counts; what is less accurate than the fastest point can be slower than it, but not better: 0 at
    most."""
    x, y = front(points, mixtures)
    gap = 1 - method[1] / float(np.interp(method[0], x, y))
    return min(gap, 0.0) if method[0] < x[0] else gap


def gap_with_interval(methods: np.ndarray, fixed: np.ndarray, mixtures: bool = False, draws: int = 1000,
                      seed: int = 0) -> tuple[float, float, float]:
    """Mean gap over methods (seeds of one recipe), with a 95 % interval: (m, n, 2) and (k, n, 2) outcomes of
    the same n problems, (correct, ms) each. Problems are drawn with replacement, for methods and frontier
    alike, and the frontier is built anew."""
    weights = draws_of(fixed.shape[1], draws, seed)
    points, own = (np.einsum("dn,knc->dkc", weights, outcomes, optimize=True)  # as a product of matrices
                   for outcomes in (fixed, methods))
    gaps = [np.mean([frontier_gap(tuple(method), points[d], mixtures) for method in own[d]])
            for d in range(draws + 1)]
    low, high = np.percentile(gaps[1:], [2.5, 97.5])
    return float(gaps[0]), float(low), float(high)
