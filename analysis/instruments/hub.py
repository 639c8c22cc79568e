"""Problems of data sets of the hub, by the package datasets: which column asks, where the gold stands."""
import hashlib
import random
from functools import lru_cache

from analysis.instruments.grading import boxed

QUESTIONS = ("question", "problem", "Question", "Problem")
GOLDS = ("answer", "Answer", "final_answer")  # the first that a row has
WORKED = ("solution", "Solution")  # hold a gold where they mark it: no proof is one
CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")  # GPQA
LETTERS = "ABCD"


def gold_of(value) -> str:
    """The gold answer in a column: what follows the last #### (GSM8K), the last box (a worked solution of
    MATH or Minerva), all members of a list (OlympiadBench), a whole number without its .0 (AMC); "" where
    there is none."""
    if isinstance(value, list):
        return ", ".join(gold_of(one) for one in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = "" if value is None else str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return text if boxed(text) is None else boxed(text)


def multiple_choice(row: dict) -> dict:
    """A question of GPQA with its four answers, in an order by its hash; the gold is a letter."""
    asked = row["Question"].strip()
    order = list(CHOICES)
    random.Random(hashlib.sha256(asked.encode()).hexdigest()).shuffle(order)
    listed = "\n".join(f"({letter}) {str(row[name]).strip()}" for letter, name in zip(LETTERS, order))
    return {"question": f"{asked}\n\n{listed}\n\nAnswer with the letter of the right one.",
            "answer": LETTERS[order.index(CHOICES[0])]}


def stated(row: dict, where: str) -> dict:
    """{"question", "answer"} of a row. ValueError, beginning with `where`, for a row that lacks one."""
    if all(name in row for name in ("Question", *CHOICES)):
        return multiple_choice(row)
    asks = next((name for name in QUESTIONS if row.get(name)), None)
    golds = [row[name] for name in GOLDS if row.get(name) is not None]
    golds += [row[name] for name in WORKED if boxed(str(row.get(name))) or "####" in str(row.get(name))]
    gold = gold_of(golds[0]) if golds else ""
    if not asks or not gold:
        what, names = ("gold answer", GOLDS + WORKED) if asks else ("question", QUESTIONS)
        raise ValueError(f"{where} has no {what}: expected one in a column {' or '.join(names)}, got columns "
                         f"{', '.join(row)}")
    return {"question": row[asks].strip(), "answer": gold}


@lru_cache(maxsize=None)
def data_set(source: str) -> dict[str, list[dict]]:
    """{part: rows} of REPO, REPO:CONFIG or REPO:CONFIG:PART, such as openai/gsm8k:main:test; REPO may be a
    local folder, CONFIG empty for the default. ValueError for what cannot be had."""
    repo, config, part, *more = [*source.split(":"), "", ""]
    if len(more) > 2 or not repo:
        raise ValueError(f"--problems {source}: expected a file, or a data set as REPO:CONFIG:PART, such as "
                         "openai/gsm8k:main:test")
    try:
        from datasets import exceptions, load_dataset
    except ImportError:
        raise ValueError(f"--problems {source} is a data set: expected the package datasets (pip install "
                         "datasets), or a JSONL file") from None
    try:
        loaded = load_dataset(repo, config or None, split=part or None)
    except (OSError, ValueError, RuntimeError, exceptions.DatasetsError) as error:
        raise ValueError(f"--problems {source}: no such file, and no data set that can be loaded "
                         f"({str(error).splitlines()[0]})") from None
    return {name: [stated(row, f"--problems {source}: row {i} of {name}") for i, row in enumerate(rows, 1)]
            for name, rows in ({part: loaded} if part else loaded).items()}
