"""A small corpus in the shipped tokenizer's tokens, shared by the tests of `distill/`."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from quire.distill.corpus import Corpus, build_corpus, standard_library
from quire.distill.samples import SampleMaker
from quire.distill.vocabulary import load_tokenizer

SHIPPED = Path(__file__).parents[2] / "models" / "quire-mini"


@pytest.fixture(scope="session")
def shipped() -> Path:
    """Folder of the shipped checkpoint."""
    return SHIPPED


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return load_tokenizer(SHIPPED)


@pytest.fixture(scope="session")
def corpus(tokenizer: Tokenizer) -> Corpus:
    """The first files of the standard library; some are held out."""
    return build_corpus(tokenizer, standard_library(limit=120))


@pytest.fixture(scope="session")
def maker(corpus: Corpus, tokenizer: Tokenizer) -> SampleMaker:
    """Row generator over the small corpus."""
    return SampleMaker(corpus, tokenizer)
