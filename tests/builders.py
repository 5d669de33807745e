"""Tiny tokenizers and models, written in a second."""

from pathlib import Path

from test_engine import WORDS
from transformers import PreTrainedTokenizerFast

from disranker import fit, teacher
from disranker.contract import Tokens
from disranker.recipe import Student, Teacher

TEXTS = [" ".join(WORDS)] * 3
TINY = Teacher(vocabulary=400, width=32, layers=2, heads=1, max_query_tokens=6, max_title_tokens=8, max_tokens=24)
TINY_STUDENT = Student(
    vocabulary=120, width=16, layers=2, heads=2, max_query_tokens=6, max_title_tokens=8, max_tokens=24
)


def doc(doc_id, title="red shoe", summary="", source="shown", **known):
    """A candidate as the table `groups` holds it; what is not known is None."""
    unknown = dict.fromkeys(("grade", "attractiveness", "impressions")) | {"asked": True}
    return {"doc_id": doc_id, "title": title, "summary": summary, "source": source} | unknown | known


def save_decoder(folder: Path, seed: int = 0) -> Path:
    """A Llama of random weights with its tokenizer and contract."""
    teacher.scratch(folder, TEXTS, TINY, seed)
    Tokens.agree(folder, "decoder", TINY).contract.save(folder)
    return folder


def respecial(folder: Path, **tokens: str) -> None:
    """Gives the tokenizer of a folder other special tokens."""
    file = str(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **tokens).save_pretrained(folder)


def stepped(run: fit.Fit, state: dict | None = None, stop: int | None = None) -> fit.Fit:
    """A training that went on from a state, to a step or to its end."""
    if state:
        run.load(state)
    for progress in run.steps():
        if progress.step == stop:
            break
    return run


class Dies:
    """A file system under which a process dies when something is to be removed for good."""

    def __init__(self, fs):
        self.fs = fs

    def delete_dir(self, *_):
        raise KeyboardInterrupt

    def __getattr__(self, name):
        return getattr(self.fs, name)
