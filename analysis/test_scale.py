"""What machines of GPUs would do, on paper."""
import numpy as np
import pytest

import rstitch
from analysis import scale
from analysis.instruments.shapes import bytes_of


def test_a_step_by_hand():
    """The 7B shape reads 14.1 GB: at 70 % of 3.35 TB/s 6.03 ms; 4,096 cached tokens of 57,344 bytes are 0.235
    GB, 0.10 ms; and 0.3 ms are fixed. Over two GPUs each reads half, and 56 sums of 0.02 ms are added."""
    read = bytes_of("7B", 1, 1, 2)[1]
    assert read == pytest.approx(14.1e9, rel=0.01)
    step = 1e3 * (read + 4096 * 57_344) / (0.7 * 3.35e12)
    assert scale.Plan("1.5B", "7B", 1).cost()(rstitch.LLM, [1]) == pytest.approx(0.3 + step)
    assert scale.Plan("1.5B", "7B", 2).cost()(rstitch.LLM, [1]) == pytest.approx(0.3 + 56 * 0.02 + step / 2)


def test_long_reads_are_bound_by_products():
    plan = scale.Plan("1.5B", "7B", 1)
    ms = 1e3 * 4000 * bytes_of("7B", 1, 1, 2)[1] / (0.5 * 989e12)
    assert plan.cost()(rstitch.LLM, [4000]) == pytest.approx(0.3 + ms)
    assert scale.bound(plan, 1) == "weights" and scale.bound(plan, 2000) == "caches"


def test_rows_fill_the_memory():
    plan = scale.Plan("1.5B", "32B", 2)
    used = sum(held + plan.rows() * 8192 * cached for held, _, cached in map(plan.sizes, (0, 1)))
    assert used < 0.9 * 80e9 < used + 8192 * sum(plan.sizes(model)[2] for model in (0, 1))
    assert scale.Plan("1.5B", "32B", 1).rows() < plan.rows()


def test_the_llm_alone_is_the_limit_of_calling_it_always():
    plan = scale.Plan("1.5B", "7B", 1)

    class Always:
        """The SLM leaves at its first proposal, the LLM stays from then on."""

        def leaves(self, batch, tokens):
            out = np.zeros((2, batch, tokens), bool)
            out[0], out[1, :, 0] = True, True
            return out

    stitched, alone = scale.tokens_per_s(plan, 4, Always())
    assert stitched == pytest.approx(alone, rel=0.01)


def test_the_table_is_the_one_of_the_page(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scale"])
    scale.main()
    page = (scale.__file__.replace("scale.py", "README.md"))
    assert capsys.readouterr().out.strip() in open(page, encoding="utf-8").read()
