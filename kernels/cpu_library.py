"""The compiled C++ kernels as Python functions: signatures, and the one handle to the loaded library."""

import ctypes
import functools
import logging
from pathlib import Path

import torch  # torch brings libgomp; loaded first, its copy is the one that our kernels' threads come from

from .compiler import CompileError, cache_folder, compile_library

log = logging.getLogger("quire")

DTYPES = (torch.float32, torch.bfloat16)
"""What the C++ kernels compute; other types go to the reference."""

_FOLDER = Path(__file__).parent
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class AttentionArgs(ctypes.Structure):
    """`quire::Args` of cpu_attention.h: pointers, strides in elements, sizes."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value", "pool", "entry_positions", "page_table", "kept")),
        *((name, _POINTER) for name in ("query_start", "positions", "visible", "sinks", "output")),
        *((name, _LONG) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, _LONG) for name in ("table_sequence", "table_head", "kept_sequence")),
        *((name, _LONG) for name in ("sequences", "heads", "kv_heads", "width", "value_width", "page_size")),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("window", ctypes.c_int32),
    )


class Matrix(ctypes.Structure):
    """`quire::Matrix` of cpu_kernels.h."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class DecoderLayerArgs(ctypes.Structure):
    """`quire::DecoderLayer` of cpu_kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "head_norm")),
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        ("window", _LONG),
    )


class DecoderArgs(ctypes.Structure):
    """`quire::Decoder` of cpu_kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("layers", "embedding", "norm", "head")),
        *((name, _LONG) for name in ("count", "hidden", "feed_forward", "vocab")),
        ("epsilon", _FLOAT),
        ("is_bf16", _INT),
    )


class DecoderStepArgs(ctypes.Structure):
    """`quire::DecoderStep` of cpu_kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("ids", "cos", "sin", "angle_rows", "logit_rows", "logits")),
        *((name, _POINTER) for name in ("x", "heads", "gated", "turns", "normed")),
        *((name, _LONG) for name in ("rows", "wanted", "half", "table_layer", "kept_layer")),
        ("threads", _INT),
    )


class DraftChainArgs(ctypes.Structure):
    """`quire::DraftChain` of cpu_draft_chain.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("tokens", "active", "first", "temperature", "top_p", "floor")),
        *((name, _POINTER) for name in ("top_k", "seeds", "positions", "places", "scaled")),
        *((name, _LONG) for name in ("depth", "sequences")),
    )


class SlotTablesArgs(ctypes.Structure):
    """`quire::SlotTables` of cpu_decode_step.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("page_table", "kept", "computed", "closes_up", "unaltered", "min_ends")),
        *((name, _POINTER) for name in ("strengths", "keys", "newest")),
        *((name, _LONG) for name in ("columns", "strength_columns")),
    )


class DecodeRowsArgs(ctypes.Structure):
    """`quire::DecodeRows` of cpu_decode_step.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("slots", "starts", "ends", "ids", "drafts", "cos", "sin", "tokens", "counts")),
        *((name, _POINTER) for name in ("places", "scaled", "logits", "masked", "masks")),
        *((name, _LONG) for name in ("count", "half", "positions", "mask_stride", "width")),
        *((name, _INT) for name in ("threads", "verify", "drawn")),
        *((name, ctypes.c_double) for name in ("forward_seconds", "sample_seconds")),
    )


class GramsArgs(ctypes.Structure):
    """`quire::Grams` of cpu_grams.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("tokens", "known", "newest", "older", "size")),
        *((name, _LONG) for name in ("slots", "length", "buckets", "shift", "candidates", "enough", "most")),
        ("orders", _LONG * 2),
    )


class PagesArgs(ctypes.Structure):
    """`quire::Pages` of cpu_entries.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("base", "table")),
        *((name, _LONG) for name in ("stride", "table_stride", "size")),
    )


_PAGES = ctypes.POINTER(PagesArgs)


class ScoredLayerArgs(ctypes.Structure):
    """`quire::ScoredLayer` of cpu_ranking.cpp."""

    _fields_ = (("scores", _POINTER), ("lengths", _POINTER), ("positions", PagesArgs), ("entries", _LONG))


class CpuLibrary:
    """The functions of the library; arguments as in the C++ sources."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.linear = library.quire_linear
        self.linear.argtypes = [_POINTER] * 5 + [_LONG] * 6 + [_INT] * 4
        self.rms_norm = library.quire_rms_norm
        self.rms_norm.argtypes = [_POINTER] * 3 + [_LONG] * 3 + [_FLOAT, _INT, _INT]
        self.rotate = library.quire_rotate
        self.rotate.argtypes = [_POINTER] * 4 + [_LONG] * 5 + [_FLOAT, _INT, _INT]
        self.attention = library.quire_attention
        self.attention.argtypes = [ctypes.POINTER(AttentionArgs), _INT, _INT, _INT, _INT]
        self.forward = library.quire_forward
        self.forward.argtypes = [ctypes.POINTER(kind) for kind in (DecoderArgs, DecoderStepArgs, AttentionArgs)]
        self.draft_chain = library.quire_draft_chain
        self.draft_chain.argtypes = [*self.forward.argtypes, ctypes.POINTER(DraftChainArgs)]
        self.decode_step = library.quire_decode_step
        decoding = (DecoderArgs, AttentionArgs, SlotTablesArgs, DecodeRowsArgs)
        self.decode_step.argtypes = [ctypes.POINTER(kind) for kind in decoding]
        self.match_grams = library.quire_match_grams
        self.match_grams.argtypes = [ctypes.POINTER(GramsArgs), _POINTER, _LONG, _POINTER]
        self.continue_grams = library.quire_continue_grams
        self.continue_grams.argtypes = [
            ctypes.POINTER(GramsArgs), _POINTER, _POINTER, _LONG, _POINTER, _LONG, _POINTER
        ]  # fmt: skip
        self.survey_rows = library.quire_survey_rows
        self.survey_rows.argtypes = [_POINTER] * 3 + [_LONG] * 3 + [_INT]
        self.shape_rows = library.quire_shape_rows
        self.shape_rows.argtypes = [_POINTER] * 6 + [_LONG] * 3 + [_INT]
        self.draw_rows = library.quire_draw_rows
        self.draw_rows.argtypes = [_POINTER] * 4 + [_LONG] * 2 + [_INT]
        self.judge_rows = library.quire_judge_rows
        self.judge_rows.argtypes = [_POINTER] * 8 + [_LONG] * 2 + [_INT]
        self.compact = library.quire_compact
        self.compact.argtypes = [_POINTER] * 6 + [_LONG] * 6 + [_INT]
        self.attention_columns = library.quire_attention_columns
        self.attention_columns.argtypes = [
            _POINTER,
            *[_PAGES] * 2,
            *[_POINTER] * 4,
            *[_LONG] * 7,
            *[_FLOAT] * 2,
            *[_INT] * 3,
        ]
        self.expected_logits = library.quire_expected_logits
        self.expected_logits.argtypes = [_PAGES, *[_POINTER] * 6, *[_LONG] * 5, _FLOAT, _INT]
        self.add_moments = library.quire_add_moments
        self.add_moments.argtypes = [_POINTER] * 5 + [_LONG] * 5 + [_INT]
        self.moments_of = library.quire_moments_of
        self.moments_of.argtypes = [_POINTER] * 4 + [_LONG] * 3 + [_INT]
        self.mean_probabilities = library.quire_mean_probabilities
        self.mean_probabilities.argtypes = [_POINTER, _PAGES, *[_POINTER] * 2, *[_LONG] * 3, *[_INT] * 2]
        self.entry_norms = library.quire_entry_norms
        self.entry_norms.argtypes = [_PAGES, *[_POINTER] * 2, *[_LONG] * 3, *[_INT] * 2]
        self.mean_cosines = library.quire_mean_cosines
        self.mean_cosines.argtypes = self.entry_norms.argtypes
        self.lag_ranks = library.quire_lag_ranks
        self.lag_ranks.argtypes = [*[_PAGES] * 2, *[_POINTER] * 2, *[_LONG] * 5, _FLOAT, *[_INT] * 2]
        self.mean_by_token = library.quire_mean_by_token
        self.mean_by_token.argtypes = [_POINTER] * 3 + [_LONG] * 4 + [_INT]
        self.mean_by_neighbours = library.quire_mean_by_neighbours
        self.mean_by_neighbours.argtypes = [_POINTER, _PAGES, *[_POINTER] * 2, *[_LONG] * 2, *[_INT] * 2]
        self.rank_entries = library.quire_rank_entries
        self.rank_entries.argtypes = [ctypes.POINTER(ScoredLayerArgs), *[_POINTER] * 2, *[_LONG] * 3, *[_INT] * 3]
        self.best_entries = library.quire_best_entries
        self.best_entries.argtypes = [_POINTER] * 3 + [_LONG] * 3 + [_INT]
        self.share_best = library.quire_share_best
        self.share_best.argtypes = [_POINTER] * 2 + [_LONG] * 4 + [_INT]
        layers = (self.linear, self.rms_norm, self.rotate, self.attention, self.draft_chain)
        choices = (self.survey_rows, self.shape_rows, self.draw_rows, self.judge_rows)
        scores = (self.attention_columns, self.expected_logits, self.entry_norms, self.mean_cosines, self.lag_ranks)
        means = (
            self.add_moments,
            self.moments_of,
            self.mean_by_token,
            self.mean_by_neighbours,
            self.mean_probabilities,
        )
        ranking = (self.rank_entries, self.best_entries, self.share_best)
        for function in (*layers, *choices, self.match_grams, self.compact, *scores, *means, *ranking):
            function.restype = None
        self.forward.restype = ctypes.c_int
        self.decode_step.restype = _LONG


def load_library(folder: Path) -> CpuLibrary:
    """Compile into `folder` if need be, and load; raises `CompileError`."""
    sources, headers = sorted(_FOLDER.glob("cpu_*.cpp")), sorted(_FOLDER.glob("cpu*.h"))
    if not sources:
        raise CompileError("their sources are not installed")
    try:
        return CpuLibrary(compile_library(sources, headers, folder))
    except (OSError, AttributeError) as error:
        raise CompileError(f"the compiled library cannot be loaded: {error}") from error


@functools.cache
def cpu_library() -> CpuLibrary | None:
    """The library, compiled at first use; None, with one warning, where that fails."""
    try:
        return load_library(cache_folder())
    except CompileError as error:
        log.warning("CPU kernels are not available, plain torch is used and is several times slower: %s", error)
        return None


def loaded_library() -> CpuLibrary:
    """The library for a caller that was handed the backend "cpu"."""
    library = cpu_library()
    assert library is not None, "the backend is cpu, but resolve_backend did not say so"
    return library
