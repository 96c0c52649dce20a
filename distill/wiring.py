"""An initialisation that can already look back: n-gram induction wired into the first two attention layers.

Induction (find where the present context stood before, copy what followed) does not emerge from a few million tokens,
so it is laid into the weights before the first step and kept there by masks on the gradients:

* Residual dimension 0 is a constant. After a norm every position carries the same known number, from which a
  projection makes any fixed vector. It is large beside the rest, so the norms hardly depend on the learned content.
* A block of the embedding is a frozen random code per token: `match` dimensions of unit norm to compare tokens by and
  `tail` dimensions that make the whole code precise enough to name one of thousands of tokens.
* Layer 0: head h attends to the token h + 1 positions back (the query is the key's vector, turned by that offset, in
  the fast rotary pairs) and writes that token's match code into the reserved block h + 1.
* Layer 1, head 0: the query is the match code of the present token and blocks 1 to 3, the key is blocks 1 to 4, in the
  slow rotary pairs, which hardly turn within the context. The score therefore counts how long a suffix of the present
  context stood before position j, and the value is the code of token j: the token that followed last time.
* Layer 1, head 1 attends to its own position and subtracts the present token's code. What remains in the code block is
  the code of the copied token, and the tied output embedding turns it into a logit.
* Layer 1, head 2 compares without the present token (skip-gram), more weakly; it and everything else may be trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Decoder, Shape, rotary_frequencies


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the circuit lives in the residual stream, and how strong it is."""

    match: int = 20  # dimensions of a token's match code
    tail: int = 44  # further dimensions of its code
    offsets: int = 4  # tokens looked back by layer 0, one per query head
    fast_pairs: int = 14  # rotary pairs used to tell neighbouring positions apart
    constant: float = 2.0
    content_std: float = 0.05
    code_norm: float = 0.5  # norm of each of the two parts of a code
    sharpness: float = 11.0  # score gap between offset o and its neighbours in layer 0, and own position in layer 1
    match_gain: float = 9.0  # score of one fully matching token in layer 1
    match_weights: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)  # present token first
    skip_weights: tuple[float, ...] = (0.0, 1.0, 0.8, 0.7)
    copy_gain: float = 3.0  # code written by head 0, in units of a token's own code
    skip_gain: float = 0.5
    final_weight: float = 3.0  # final norm's weight on the code block

    @property
    def code(self) -> int:
        """Width of the code block."""
        return self.match + self.tail

    @property
    def reserved(self) -> int:
        """Residual dimensions at the end that hold the code and the blocks of earlier tokens."""
        return self.code + self.offsets * self.match

    def content(self, hidden: int) -> slice:
        """The learned dimensions of the residual stream."""
        return slice(1, hidden - self.reserved)

    def code_slice(self, hidden: int) -> slice:
        """The frozen code of the present token."""
        start = hidden - self.reserved
        return slice(start, start + self.code)

    def block(self, hidden: int, offset: int) -> slice:
        """Match code of the token `offset` positions back; offset 0 is the first part of the code."""
        start = hidden - self.reserved
        if offset:
            start += self.code + (offset - 1) * self.match
        return slice(start, start + self.match)


def token_codes(vocab: int, layout: Layout, generator: torch.Generator) -> Tensor:
    """Random code per token, [vocab, code]; the match part and the tail each have norm `code_norm`."""
    codes = torch.randn(vocab, layout.code, generator=generator)
    parts = codes.split([layout.match, layout.tail], dim=1)
    return torch.cat([p / p.norm(dim=1, keepdim=True) for p in parts], dim=1) * layout.code_norm


def nominal_rms(shape: Shape, layout: Layout, blocks: int) -> float:
    """Root mean square of the residual stream that holds a token's embedding and `blocks` match blocks."""
    content = (shape.hidden - layout.reserved - 1) * layout.content_std**2
    return ((layout.constant**2 + content + (2 + blocks) * layout.code_norm**2) / shape.hidden) ** 0.5


def wire(model: Decoder, layout: Layout, seed: int = 0) -> None:
    """Overwrite the weights of a fresh decoder, in place, with the wired initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _initialise(model, layout, generator)
        _wire_embedding(model, layout, generator)
        _wire_layer0(model, layout)
        _wire_layer1(model, layout)


def _initialise(model: Decoder, layout: Layout, generator: torch.Generator) -> None:
    """Plain start: inner maps of std 1/sqrt(n_in), output maps zero, norms that tame the constant."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            parameter[0] = 0.05
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif name != "embed_tokens.weight":
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    final = model.norm.weight
    final.fill_(0.5)
    final[0] = 0.0
    final[-layout.reserved :] = 0.0
    final[layout.code_slice(model.shape.hidden)] = layout.final_weight


def _wire_embedding(model: Decoder, layout: Layout, generator: torch.Generator) -> None:
    """Constant, random content, frozen code, empty blocks."""
    weight, hidden = model.embed_tokens.weight, model.shape.hidden
    weight.zero_()
    weight[:, 0] = layout.constant
    content = layout.content(hidden)
    weight[:, content] = layout.content_std * torch.randn(
        weight.shape[0], content.stop - content.start, generator=generator
    )
    weight[:, layout.code_slice(hidden)] = token_codes(weight.shape[0], layout, generator)


def _fast_vector(shape: Shape, layout: Layout, offset: int) -> Tensor:
    """Unit vector [D] in the fast rotary pairs, turned back by `offset` positions."""
    vector = torch.zeros(shape.head_dim, dtype=torch.float64)
    pairs = layout.fast_pairs
    angle = rotary_frequencies(shape)[:pairs] * offset
    vector[:pairs] = angle.cos()
    vector[shape.head_dim // 2 : shape.head_dim // 2 + pairs] = -angle.sin()
    return (vector / pairs**0.5).float()


def _position_gain(shape: Shape, layout: Layout) -> float:
    """Length of query and key vectors that gives neighbours of the wanted position `sharpness` less score."""
    lag = torch.arange(1, 64, dtype=torch.float64)
    kernel = torch.outer(lag, rotary_frequencies(shape)[: layout.fast_pairs]).cos().mean(1)
    gap = 1.0 - kernel.max().item()
    return (layout.sharpness * shape.head_dim**0.5 / gap) ** 0.5


def _wire_layer0(model: Decoder, layout: Layout) -> None:
    """Heads that look 1 to `offsets` tokens back and write the match codes they find."""
    shape, attention = model.shape, model.block(0).self_attn
    hidden, dim = shape.hidden, shape.head_dim
    rms = nominal_rms(shape, layout, 0)
    constant = layout.constant / rms * model.block(0).input_layernorm.weight[0].item()
    gain = _position_gain(shape, layout) / constant
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    source = layout.block(hidden, 0)
    eye = torch.eye(layout.match)
    for head in range(shape.kv_heads):
        attention.k_proj.weight[head * dim : (head + 1) * dim, 0] = gain * _fast_vector(shape, layout, 0)
        rows = attention.v_proj.weight[head * dim : head * dim + layout.match]
        rows.zero_()
        rows[:, source] = eye
    for head in range(shape.heads):
        vector = gain * _fast_vector(shape, layout, head + 1)
        attention.q_proj.weight[head * dim : (head + 1) * dim, 0] = vector
        columns = slice(head * dim, head * dim + layout.match)
        attention.o_proj.weight[layout.block(hidden, head + 1), columns] = rms * eye


def _slow_dims(shape: Shape, layout: Layout, offset: int) -> Tensor:
    """Head dimensions that compare tokens `offset` back: the slowest pairs for offset 0, both halves."""
    width = layout.match // 2
    half = shape.head_dim // 2
    first = torch.arange(half - (offset + 1) * width, half - offset * width)
    return torch.cat([first, first + half])


def _suffix_query(shape: Shape, layout: Layout, weights: tuple[float, ...], gain: float) -> Tensor:
    """Query rows [D, E]: match codes of the present and earlier tokens, times gain and weight."""
    rows = torch.zeros(shape.head_dim, shape.hidden)
    for offset, weight in enumerate(weights):
        block = layout.block(shape.hidden, offset)
        dims = _slow_dims(shape, layout, offset)
        rows[dims, torch.arange(block.start, block.stop)] = gain * weight
    return rows


def _wire_layer1(model: Decoder, layout: Layout) -> None:
    """Suffix matching (head 0), removal of the present token's code (head 1), weak skip-gram matching (head 2)."""
    shape, layer = model.shape, model.block(1)
    hidden, dim, attention = shape.hidden, shape.head_dim, layer.self_attn
    rms = nominal_rms(shape, layout, layout.offsets)
    constant = layout.constant / rms * layer.input_layernorm.weight[0].item()
    position = _position_gain(shape, layout) / constant
    match = (layout.match_gain * dim**0.5) ** 0.5 * rms / layout.code_norm
    key = _shifted_key(shape, layout, match)
    code = layout.code_slice(hidden)
    eye = torch.eye(layout.code)
    for head in range(shape.kv_heads):
        attention.k_proj.weight[head * dim : (head + 1) * dim] = key
        rows = attention.v_proj.weight[head * dim : head * dim + layout.code]
        rows.zero_()
        rows[:, code] = eye
    attention.k_proj.weight[:dim, 0] = position * _fast_vector(shape, layout, 0)
    query = attention.q_proj.weight
    query[:dim] = _suffix_query(shape, layout, layout.match_weights, match)
    query[dim : 2 * dim] = 0.0
    query[dim : 2 * dim, 0] = position * _fast_vector(shape, layout, 0)
    query[2 * dim : 3 * dim] = _suffix_query(shape, layout, layout.skip_weights, match)
    for head, gain in enumerate((layout.copy_gain, -1.0, layout.skip_gain)):
        attention.o_proj.weight[code, head * dim : head * dim + layout.code] = gain * rms * eye


def _shifted_key(shape: Shape, layout: Layout, gain: float) -> Tensor:
    """Key rows [D, E]: dimensions compared with offset o of the query read the token o + 1 back."""
    rows = torch.zeros(shape.head_dim, shape.hidden)
    for offset in range(layout.offsets):
        block = layout.block(shape.hidden, offset + 1)
        rows[_slow_dims(shape, layout, offset), torch.arange(block.start, block.stop)] = gain
    return rows


def trainable_masks(model: Decoder, layout: Layout) -> dict[str, Tensor]:
    """Masks (1 trains, 0 stays) for the parameters that the circuit owns in part; others train whole."""
    shape, hidden, dim = model.shape, model.shape.hidden, model.shape.head_dim
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters() if _touched(name)}
    reserved = slice(hidden - layout.reserved, hidden)
    code = layout.code_slice(hidden)
    masks["embed_tokens.weight"][:, reserved] = 0.0
    masks["embed_tokens.weight"][:, 0] = 0.0
    for name in ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"):
        masks[name].zero_()
    for head in range(shape.kv_heads):
        masks["layers.0.self_attn.v_proj.weight"][head * dim : head * dim + layout.match] = 0.0
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        masks[name][reserved] = 0.0
        masks[name][0] = 0.0
    masks["layers.1.self_attn.q_proj.weight"][: 2 * dim] = 0.0
    masks["layers.1.self_attn.k_proj.weight"][:dim] = 0.0
    masks["layers.1.self_attn.v_proj.weight"][: layout.code] = 0.0
    masks["layers.1.self_attn.o_proj.weight"][code, : 2 * dim] = 0.0
    for layer in (0, 1):
        masks[f"layers.{layer}.input_layernorm.weight"][reserved] = 0.0
        masks[f"layers.{layer}.input_layernorm.weight"][0] = 0.0
    return masks


def _touched(name: str) -> bool:
    """Whether the circuit owns some of this parameter."""
    if name in ("embed_tokens.weight", "layers.0.mlp.down_proj.weight"):
        return True
    return name.startswith(("layers.0.", "layers.1.")) and ("self_attn" in name or "input_layernorm" in name)
