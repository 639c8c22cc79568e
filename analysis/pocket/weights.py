"""The pocket pair's weights."""
from pathlib import Path

import rstitch

MODELS = Path(__file__).parent / "models"
MAX_NEW_TOKENS = 320  # the longest of 20,000 fully worked-out solutions takes 226


def load_pocket(slm: str = "slm", llm: str = "llm", device: str = "cpu", dtype: str = "float32"):
    """(SLM, LLM, tokenizer) of the pocket pair; `llm="llm-short"` is the control."""
    return rstitch.load_pair(str(MODELS / slm), str(MODELS / llm), device, dtype)
