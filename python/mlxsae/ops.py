"""The operations, as functions on MLX arrays and sparse codes.

Every weight argument is feature-major: an encoder ``[d_sae, d_in]``, a decoder ``[d_sae, d_out]``, a feature a row (an
SAE's public ``W_enc.T`` is such a view, and is recognised without a copy). Floating types are float32, float16 and
bfloat16 in any mixture; accumulation is in float32. All but :func:`update_tokens_since_fired`,
:func:`encoder_shadow`, :func:`feature_update` and :func:`adam_catch_up` are differentiable to any order, and all but :func:`threshold_encode`
work under ``mx.compile`` and ``mx.vmap`` (of :func:`feature_update` return the arrays: ``mx.vmap`` takes no None). Where
a device has no kernel of ours, plain MLX ops run instead; :func:`backends` tells.

What does not fit raises ``ValueError`` when the op is called, and what is no array ``TypeError``. Where a code's indices
are not below ``d_sae``, or offsets do not ascend from 0 to at most ``nnz``, is seen when the result is evaluated on the
CPU: a ``RuntimeError``; a GPU does not look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx

from . import _ext
from .code import Code, DenseCode, Sparse, SparseCode, SparseCodeCSR
from .code import n_tokens as tokens_of

Stream = mx.Stream | mx.Device | None

__all__ = [
    "Params",
    "Shadow",
    "Term",
    "adam_catch_up",
    "backends",
    "batch_topk_encode",
    "decode_residual",
    "encoder_shadow",
    "feature_update",
    "gather_dot",
    "num_threads",
    "plain",
    "products_are_tf32",
    "set_num_threads",
    "sparse_decode",
    "sparse_outer",
    "threshold_encode",
    "threshold_encode_capped",
    "topk_encode",
    "topk_encode_masked",
    "unwritten",
    "update_tokens_since_fired",
]


class Shadow(NamedTuple):
    """A float32 encoder in 16 bits, with what bounds the error of products with it: :func:`encoder_shadow`."""

    w16: mx.array  # [d_sae, d_in] bfloat16 or int16, or [d_sae, 2 d_in] int8
    columns: (
        mx.array
    )  # [3, d_sae] float32: |w|, |w - w16| plus its rounding, an absolute floor; [6, d_sae] for int8


def encoder_shadow(w_enc: mx.array, *, dtype: mx.Dtype | None = None, stream: Stream = None) -> Shadow:
    r"""The shadow of ``w_enc [d_sae, d_in]``, for certified encoding. Make it anew whenever ``w_enc`` changes.

    .. math:: |x W_j - x_{16} W_{16,j}| \le |x| \, |W_j - W_{16,j}| + |x - x_{16}| \, |W_{16,j}| + \text{rounding}

    Args:
        w_enc: converted to float32.
        dtype: bfloat16; or, on the CPU only, int16: row j is then whole numbers in units of ``columns[0, j] / 2**15``, as
            ``columns[0]`` is the rows' norms, rounded up; or int8: ``d_in`` high bytes, then ``d_in`` low ones, of the whole
            numbers ``columns[3, j] * high + low`` in units of ``columns[0, j] * 1.015625 / 2**15``, so that a product of high
            bytes decides most pairs, and both bytes the rest. None: what the device screens fastest with: int8 on x86
            processors with VNNI, int16 on others, bfloat16 elsewhere. A processor without a product of such numbers runs
            the float32 kernel where it is given this shadow.
        stream: stream or device.

    Raises:
        ValueError: a ``w_enc`` of another rank or type, another ``dtype``, int16 or int8 on a GPU.
    """
    return Shadow(*_ext.encoder_shadow(w_enc, dtype=dtype, stream=stream))


def topk_encode(
    x: mx.array,
    w_enc: mx.array,
    b_enc: mx.array | None = None,
    *,
    k: int,
    shadow: Shadow | None = None,
    tf32: bool = False,
    stream: Stream = None,
) -> SparseCode:
    r"""The ``k`` largest pre-activations of each row, then relu.

    .. math:: z = x W_{enc}^\top + b_{enc}, \qquad f = \mathrm{relu}(\mathrm{top}_k(z))

    Selection is exact on float32 pre-activations, each accumulated over ascending coordinates with fused multiply-adds,
    and ties go to the lowest index. Those that a proven bound on a product of 8 or 16 bits excludes are not computed, on
    x86 and for 128 float32 rows or more; the result has the same bits. The pre-activations are never stored: memory is O(n k), whatever ``d_sae`` is. NaN
    counts as the largest value and stays NaN.

    Args:
        x: ``[n, d_in]``.
        w_enc: ``[d_sae, d_in]``.
        b_enc: ``[d_sae]`` or None.
        k: entries kept per row, in ``(0, d_sae]``. Always ``k`` slots: where fewer pre-activations are positive, the
            others hold value 0.
        shadow: ``encoder_shadow(w_enc)`` for certified low precision: the product runs in 16 bits, a proven error bound
            decides which features are computed again in float32, and the result has the same bits as without. Where the
            processor has no product for the shadow's type the float32 kernel runs.
        tf32: on a GPU, and for float32 operands, let MLX's product decide as it is: that of TF32 where MLX multiplies so
            (:func:`products_are_tf32`). Fast, not exact. Changes nothing on the CPU, for eight rows or fewer, or for
            operands of 16 bits, which a GPU never screens: theirs is the result of the product in their type.

    Returns:
        ``SparseCode(values [n, k], indices [n, k])``, values in the promoted type of ``x`` and ``w_enc``, indices
        ascending in each row. The gradient is that of the selected entries, zero where the value is not positive.

    Raises:
        ValueError: for other ranks, sizes, types or ``k``.

    Example:
        >>> code = topk_encode(mx.random.normal((8, 64)), mx.random.normal((1024, 64)), k=4)
        >>> code.values.shape, code.indices.dtype
        ((8, 4), mlx.core.uint32)

    Source: Gao et al., *Scaling and evaluating sparse autoencoders*, 2024, section 2.3.
    """
    return SparseCode(*_ext.topk_encode(x, w_enc, b_enc, k=k, shadow=shadow, tf32=tf32, stream=stream))


def topk_encode_masked(
    x: mx.array,
    w_enc: mx.array,
    b_enc: mx.array | None = None,
    *,
    mask: mx.array,
    k: int,
    k_aux: int,
    shadow: Shadow | None = None,
    tf32: bool = False,
    stream: Stream = None,
) -> tuple[SparseCode, SparseCode]:
    r""":func:`topk_encode`, and from the same product the ``k_aux`` largest among masked features, then relu.

    .. math:: f' = \mathrm{relu}(\mathrm{top}_{k_{aux}}(z_j : \mathrm{mask}_j))

    Args:
        x, w_enc, b_enc, k, shadow, tf32: as in :func:`topk_encode`.
        mask: ``[d_sae]`` bool; AuxK's dead features.
        k_aux: slots of the second selection, in ``(0, d_sae]``. Where fewer features are masked the others are unused.

    Returns:
        The code and the masked code ``(values [n, k_aux], indices [n, k_aux])``, of the same types. Each has the gradient
        of its own entries.

    Raises:
        ValueError: as :func:`topk_encode`; for another ``mask`` or ``k_aux``.

    Source: Gao et al., *Scaling and evaluating sparse autoencoders*, 2024, appendix A.2.
    """
    values, indices, aux_values, aux_indices = _ext.topk_encode_masked(
        x, w_enc, b_enc, mask, k=k, k_aux=k_aux, shadow=shadow, tf32=tf32, stream=stream
    )
    return SparseCode(values, indices), SparseCode(aux_values, aux_indices)


def batch_topk_encode(
    x: mx.array,
    w_enc: mx.array,
    b_enc: mx.array | None = None,
    *,
    k: int,
    hint: mx.array | None = None,
    shadow: Shadow | None = None,
    tf32: bool = False,
    stream: Stream = None,
) -> tuple[SparseCodeCSR, mx.array]:
    r"""The ``k * n`` largest pre-activations of the whole batch, after relu (BatchTopK).

    .. math:: z = x W_{enc}^\top + b_{enc}, \qquad f = \mathrm{top}_{k n}(\mathrm{relu}(z))

    Exact on float32 pre-activations; ties go to the lowest row, then to the lowest feature. Only values > 0 (or NaN,
    which counts as the largest) are kept. The pre-activations are never stored: memory is O(n k).

    Args:
        x: ``[n, d_in]``.
        w_enc: ``[d_sae, d_in]``.
        b_enc: ``[d_sae]`` or None.
        k: mean number of entries per row, in ``(0, d_sae]``.
        hint: one number, a guess of the threshold, such as that of the last batch. A good one saves a sixteenth of the
            product; no result depends on it.
        shadow: ``encoder_shadow(w_enc)``: with a good hint the product is screened in 16 bits where the processor has
            one; the result has the same bits.
        tf32: as in :func:`topk_encode`.

    Returns:
        ``(code, threshold)``: ``nnz = k * n``, values in the promoted type of ``x`` and ``w_enc``. Where fewer
        pre-activations are positive, the entries from ``offsets[n]`` on are in no row (value 0, index 0). ``threshold``
        is the smallest value kept, one float32 number, 0 where none is; it has no derivative. The gradient of the values
        is that of the entries kept.

    Raises:
        ValueError: for other ranks, sizes, types or ``k``.

    Source: Bussmann et al., *BatchTopK sparse autoencoders*, 2024, section 3.
    """
    *code, threshold = _ext.batch_topk_encode(
        x, w_enc, b_enc, k=k, hint=hint, shadow=shadow, tf32=tf32, stream=stream
    )
    return SparseCodeCSR(*code), threshold


def threshold_encode_capped(
    x: mx.array,
    w_enc: mx.array,
    b_enc: mx.array | None = None,
    *,
    threshold: mx.array,
    capacity: int,
    stream: Stream = None,
) -> tuple[SparseCodeCSR, mx.array]:
    """:func:`threshold_encode` with room for ``capacity`` entries: no synchronisation, so it works in ``mx.compile``.

    Args:
        x, w_enc, b_enc, threshold: as in :func:`threshold_encode`.
        capacity: entries that the code has room for, in all, in ``[0, 2**31 - 1)``.

    Returns:
        ``(code, overflow)``: ``nnz = capacity``; entries from ``offsets[n]`` on are in no row (value 0, index 0).
        ``overflow`` is one bool: True where there were more entries, of which the first by row and feature were kept.

    Raises:
        ValueError: as :func:`threshold_encode`; for another ``capacity``.
    """
    *code, count = _ext.threshold_encode(x, w_enc, b_enc, threshold, capacity=capacity, stream=stream)
    return SparseCodeCSR(*code), mx.greater(count, capacity, stream=stream)


def threshold_encode(
    x: mx.array,
    w_enc: mx.array,
    b_enc: mx.array | None = None,
    *,
    threshold: mx.array,
    stream: Stream = None,
) -> SparseCodeCSR:
    r"""Every pre-activation above its threshold, after relu: JumpReLU, and BatchTopK at inference.

    .. math:: z = x W_{enc}^\top + b_{enc}, \qquad f_j = \mathrm{relu}(z_j) \, [z_j > \theta_j]

    Strictly above, on float32 pre-activations; a negative threshold acts like 0. NaN is above every threshold, and a
    threshold of NaN makes its feature's pre-activations NaN, so that it is seen.

    How many entries there are depends on the data, so this **waits for the result** (one ``mx.eval``) before it can give
    it its shape; should it exceed 256 entries a row on average, the product runs again with more room. Within
    ``mx.compile`` and ``mx.vmap`` use :func:`threshold_encode_capped`.

    Args:
        x: ``[n, d_in]``.
        w_enc: ``[d_sae, d_in]``.
        b_enc: ``[d_sae]`` or None.
        threshold: ``[d_sae]`` or one number. It gets no gradient here: how to train a threshold is a matter of the rule.

    Returns:
        ``SparseCodeCSR`` with ``nnz`` the number of entries. The gradient is that of the entries.

    Raises:
        ValueError: for other ranks, sizes or types; within ``mx.compile`` and ``mx.vmap``.

    Source: Rajamanoharan et al., *Jumping ahead*, 2024, section 3.
    """
    room = min(256 * x.shape[0], 2**31 - 2) if isinstance(x, mx.array) and x.ndim == 2 else 0
    while True:
        *code, count = _ext.threshold_encode(x, w_enc, b_enc, threshold, capacity=room, stream=stream)
        try:
            mx.eval(code, count)  # the documented synchronisation
        except ValueError as e:
            if "function transformations" not in str(e):
                raise
            raise ValueError(
                "[threshold_encode] must run outside of mx.compile and mx.vmap, as it waits for its result: within them "
                "use threshold_encode_capped."
            ) from e
        nnz = int(count)  # type: ignore[arg-type]
        if nnz <= room:
            values, indices, offsets = code
            return SparseCodeCSR(values[:nnz], indices[:nnz], offsets)
        room = nnz


def _offsets(code: Sparse) -> mx.array | None:
    return code.offsets if isinstance(code, SparseCodeCSR) else None


def sparse_decode(
    code: Sparse, w_dec: mx.array, b_dec: mx.array | None = None, *, stream: Stream = None
) -> mx.array:
    r"""The weighted sum of decoder rows that a code names.

    .. math:: \hat x_t = \sum_i v_{ti} \, W_{dec}[j_{ti}] + b_{dec}

    Args:
        code: values and indices ``[n, k]``, or compressed rows.
        w_dec: ``[d_sae, d_out]``.
        b_dec: ``[d_out]`` or None.

    Returns:
        ``[n, d_out]`` in the promoted type of values and ``w_dec``. Unused slots are skipped, whatever their row holds.

    Raises:
        ValueError: for other ranks, sizes or types.
        RuntimeError: when evaluated on the CPU, for an index that is not below ``d_sae``, or offsets that do not ascend
            from 0 to at most ``nnz``.
    """
    return _ext.sparse_decode(code.values, code.indices, w_dec, b_dec, offsets=_offsets(code), stream=stream)


def gather_dot(
    rows: mx.array, weight: mx.array, indices: mx.array | SparseCodeCSR, *, stream: Stream = None
) -> mx.array:
    r"""Dot products of each row with the weight rows that its indices name: ``rows @ weight.T`` at these places only.

    .. math:: o_{ti} = \langle r_t, W[j_{ti}] \rangle

    Args:
        rows: ``[n, d]``.
        weight: ``[d_sae, d]``.
        indices: ``[n, k]``, integers; or a code in compressed rows, whose places are meant.

    Returns:
        ``[n, k]``, or ``[nnz]``, in the promoted type of ``rows`` and ``weight``; 0 for entries that are in no row.

    Raises:
        ValueError: for other ranks, sizes or types.
        RuntimeError: when evaluated on the CPU, for indices and offsets as in :func:`sparse_decode`.
    """
    if isinstance(indices, SparseCodeCSR):
        return _ext.gather_dot(rows, weight, indices.indices, offsets=indices.offsets, stream=stream)
    return _ext.gather_dot(rows, weight, indices, stream=stream)


def sparse_outer(code: Sparse, rows: mx.array, *, d_sae: int, stream: Stream = None) -> mx.array:
    r"""The transposed decode: what each feature gathers from the rows of the tokens that it fires on.

    .. math:: o_j = \sum_{(t, i):\, j_{ti} = j} v_{ti} \, r_t

    Args:
        code: values and indices ``[n, k]``, or compressed rows.
        rows: ``[n, d]``.
        d_sae: number of features.

    Returns:
        ``[d_sae, d]`` in the promoted type of values and ``rows``. Deterministic on the CPU: tokens are added in
        ascending order.

    Raises:
        ValueError: for other ranks, sizes or types, and for ``d_sae < 1``.
        RuntimeError: when evaluated on the CPU, for indices and offsets as in :func:`sparse_decode`.
    """
    return _ext.sparse_outer(
        code.values, code.indices, rows, d_sae=d_sae, offsets=_offsets(code), stream=stream
    )


def update_tokens_since_fired(
    tokens_since_fired: mx.array, code: Code, *, n_tokens: int | None = None, stream: Stream = None
) -> mx.array:
    """Dead-feature bookkeeping: 0 where a feature fired (value > 0) in this batch, else the old count plus ``n_tokens``.

    Args:
        tokens_since_fired: ``[d_sae]`` int32.
        code: values and indices ``[n, k]``, compressed rows, or dense latents ``[n, d_sae]``.
        n_tokens: tokens of the batch; the rows of the code where None.

    Returns:
        ``[d_sae]`` int32, saturating at 2**31 - 1. NaN counts as fired.

    Raises:
        ValueError: for other ranks, sizes or types, and for ``n_tokens < 0``.
        RuntimeError: when evaluated on the CPU, for indices and offsets as in :func:`sparse_decode`.
    """
    if n_tokens is None:
        n_tokens = tokens_of(code)
    if isinstance(code, DenseCode):
        if tokens_since_fired.ndim != 1 or tokens_since_fired.dtype != mx.int32:
            raise ValueError(
                "[tokens_since_fired] tokens_since_fired must be int32 of shape [d_sae] but got "
                f"{str(tokens_since_fired.dtype).removeprefix('mlx.core.')} {tokens_since_fired.shape}."
            )
        if code.values.ndim != 2 or code.values.shape[1] != tokens_since_fired.size:
            raise ValueError(
                f"[tokens_since_fired] values must have shape [n, d_sae] = [n, {tokens_since_fired.size}] but got "
                f"{code.values.shape}."
            )
        if n_tokens < 0:
            raise ValueError(f"[tokens_since_fired] n_tokens must be at least 0 but got {n_tokens}.")
        silent = mx.minimum(tokens_since_fired, 2**31 - 1 - n_tokens) + n_tokens
        return mx.where((code.values <= 0).all(axis=0, stream=stream), silent, 0, stream=stream)
    offsets = _offsets(code)
    return _ext.tokens_since_fired(
        tokens_since_fired, code.values, code.indices, n_tokens=n_tokens, offsets=offsets, stream=stream
    )


def decode_residual(
    code: Sparse,
    w_dec: mx.array,
    target: mx.array,
    b_dec: mx.array | None = None,
    *,
    stream: Stream = None,
) -> tuple[mx.array, mx.array]:
    r"""Decode, residual and squared error in one pass.

    .. math:: r_t = \sum_i v_{ti} W_{dec}[j_{ti}] + b_{dec} - y_t, \qquad s_t = |r_t|^2

    Args:
        code: values and indices ``[n, k]``, or compressed rows.
        w_dec: ``[d_sae, d_out]``.
        target: ``[n, d_out]``.
        b_dec: ``[d_out]`` or None.

    Returns:
        ``residual [n, d_out]`` and ``square [n]``, float32.

    Raises:
        ValueError: for other ranks, sizes or types.
        RuntimeError: when evaluated on the CPU, for indices and offsets as in :func:`sparse_decode`.
    """
    return _ext.decode_residual(
        code.values, code.indices, w_dec, target, b_dec, offsets=_offsets(code), stream=stream
    )


class Params(NamedTuple):
    """The parameters of encoder and decoder, feature-major, or a moment of each."""

    w_enc: mx.array  # [d_sae, d_in]
    b_enc: mx.array  # [d_sae]
    w_dec: mx.array  # [d_sae, d_out]
    b_dec: mx.array  # [d_out]


class Term(NamedTuple):
    """One reconstruction of a loss; the gradient at its output is ``scale * residual``."""

    residual: mx.array  # [n, d_out]
    code: Sparse
    scale: mx.array  # one number


class Updated(NamedTuple):
    """What :func:`feature_update` returns."""

    params: Params
    m: Params
    v: Params
    grad_norm: mx.array  # before clipping; NaN where the step was skipped
    shadow: Shadow | None  # that of the new encoder, where one was given


def feature_update(
    x: mx.array,
    terms: list[Term],
    params: Params,
    m: Params,
    v: Params,
    *,
    loss: mx.array,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    project_decoder: bool = True,
    normalize_decoder: bool = True,
    b_dec_to_input: bool = False,
    clip_norm: float = 0.0,
    untouched: str = "step",
    shadow: Shadow | None = None,
    stream: Stream = None,
) -> Updated:
    r"""The backward pass of encode and decode and one Adam step, feature by feature, without gradient buffers.

    For feature ``j`` with entries ``(t, v)``, ``v > 0``, and :math:`g_t = s\, r_t`:

    .. math::
        \delta_t = \langle g_t, W_{dec}[j] \rangle, \quad \nabla W_{dec}[j] = \sum v\, g_t, \quad
        \nabla W_{enc}[j] = \sum \delta_t x_t, \quad \nabla b_{enc}[j] = \sum \delta_t

    then the projection of :math:`\nabla W_{dec}[j]` off :math:`W_{dec}[j]`, clipping by the global norm, Adam with bias
    correction on every feature (dense-exact: an untouched one still moves by its momentum; but see ``untouched``), and
    the renorm of :math:`W_{dec}[j]`. ``b_dec`` learns through the main term, and through the encoder where ``b_dec_to_input``.

    Args:
        x: ``[n, d_in]``, what the encoder saw.
        terms: the main reconstruction, then auxiliary ones (which have no bias), such as AuxK's.
        params, m, v: float32. Their buffers are reused where nobody else holds them: keep no second reference. The
            moments of ``w_enc`` and ``w_dec`` may be bfloat16 (all four of them): a third less memory for parameters and
            moments. Arithmetic is in float32 all the same, and what is stored is rounded *stochastically*, up or down
            with the probability that makes its mean exact: to the nearest, a second moment would lose every change below
            a 256th of itself, and with ``betas[1] = 0.999`` never fall again. The noise is a hash of step, matrix, row
            and column, the same on every device: results are repeatable.
        loss: where it is not finite, nothing changes.
        step: ``t >= 1`` of Adam's bias correction; seed of the rounding.
        clip_norm: largest global norm of all gradients after the projection; 0 for no clipping. Clipping is exact, by a
            first pass that computes the norm.
        untouched: what becomes of features without entries. ``"step"``: Adam with gradient 0. ``"keep_decoder"``:
            their ``w_dec`` and its moments stay as they are until :func:`adam_catch_up` makes the steps that they have
            missed: together the bits of ``"step"``. ``"keep"``: ``w_enc``, ``b_enc``, ``w_dec`` and
            their moments stay for good, and the missed steps are never made: *row-sparse* Adam, as
            ``torch.optim.SparseAdam`` has it. That is another optimiser: a feature's momentum neither moves it nor decays
            between its batches.
        shadow: the encoder's, to be renewed in the same pass.

    Returns:
        ``Updated(params, m, v, grad_norm, shadow)``: new values in the shapes and types of the old ones.

    Raises:
        ValueError: for other ranks, sizes or types, no terms, ``step < 1``; when differentiated.
        RuntimeError: when evaluated on the CPU, for indices and offsets as in :func:`sparse_decode`.

    Deterministic, and independent of the number of threads.
    Source: Kingma and Ba, *Adam*, 2015, Algorithm 1; Bricken et al., *Towards monosemanticity*, 2023 (projection);
    Gupta et al., *Deep learning with limited numerical precision*, 2015 (stochastic rounding).
    """
    out = _ext.feature_update(
        x,
        loss,
        [
            (t.residual, t.code.values, t.code.indices, t.scale)
            + ((t.code.offsets,) if isinstance(t.code, SparseCodeCSR) else ())
            for t in terms
        ],
        list(params),
        list(m),
        list(v),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        step=step,
        project_decoder=project_decoder,
        normalize_decoder=normalize_decoder,
        b_dec_to_input=b_dec_to_input,
        clip_norm=clip_norm,
        untouched=untouched,
        shadow=shadow,
        stream=stream,
    )
    new = Shadow(*out[13:]) if shadow else None
    return Updated(Params(*out[:4]), Params(*out[4:8]), Params(*out[8:12]), out[12], new)


class CaughtUp(NamedTuple):
    """What :func:`adam_catch_up` returns."""

    w: mx.array
    m: mx.array
    v: mx.array
    last_step: mx.array


def adam_catch_up(
    w: mx.array,
    m: mx.array,
    v: mx.array,
    last_step: mx.array,
    rows: mx.array,
    *,
    step: int,
    lr: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    normalize: bool = True,
    stream: Stream = None,
) -> CaughtUp:
    r"""The Adam steps that rows of a decoder have missed: lazy Adam, with :func:`feature_update`'s ``"keep_decoder"``.

    For row ``j`` of ``rows`` and each step :math:`t` from ``last_step[j] + 1`` to ``step``, with gradient 0:

    .. math::
        m \leftarrow \beta_1 m, \quad v \leftarrow \beta_2 v, \quad
        W_j \leftarrow W_j - \frac{lr_t}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}, \quad
        W_j \leftarrow W_j / |W_j| \text{ where } \texttt{normalize}

    A decoder's row is read where its feature fires, and moves by its momentum alone in between. So it may stay behind:
    before a batch is decoded the rows that it uses catch up to the step before, ``feature_update`` moves these and no
    others, and before anything else reads the decoder (an evaluation, a file) all rows catch up. On the CPU the result has
    the bits of dense Adam; on a GPU, whose compiler may fuse other operations in the two kernels, a last bit may differ.

    Args:
        w, m, v: ``[d_sae, d]``, as :func:`feature_update`'s ``w_dec``: float32, moments float32 or bfloat16. Their buffers are
            reused where nobody else holds them.
        last_step: int32 ``[d_sae]``, the last step that each row has made, 0 before the first.
        rows: bool ``[d_sae]``. Other rows, and those that have made ``step``, stay as they are.
        step: the last step that has been made.
        lr: learning rates of the last steps, ``lr[-1]`` that of ``step``; NaN for a step that was skipped because its loss was
            not finite. A row of ``rows`` may have missed as many steps as there are rates: so let every row catch up once in
            so many steps, each step another share of them.
        normalize: as ``feature_update``'s ``normalize_decoder``.

    Returns:
        ``CaughtUp(w, m, v, last_step)``; of rows that caught up ``last_step`` is ``step``. (Those that ``feature_update`` then
        moves have made one more.)

    Raises:
        ValueError: for other ranks, sizes or types, ``step < 1``, no rates; when differentiated.
        RuntimeError: when evaluated on the CPU, for a row that has missed more steps than there are rates. (A GPU makes those
            that it knows the rate of.)

    Deterministic, and independent of the number of threads.
    """
    return CaughtUp(
        *_ext.adam_catch_up(
            w,
            m,
            v,
            last_step,
            rows,
            lr=list(lr),
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            step=step,
            normalize=normalize,
            stream=stream,
        )
    )


def backends() -> dict[str, dict[str, str]]:
    """What runs each op on each device that MLX has here: ``{"topk_encode": {"cpu": "kernel (avx512)"}, ...}``.

    ``"fallback"`` means a graph of plain MLX ops; where a GPU's kernel did not compile, the compiler's text follows.
    """
    devices = {"cpu": mx.Device(mx.cpu)}
    if mx.is_available(mx.gpu):
        devices["gpu"] = mx.Device(mx.gpu)
    return {op: {name: _ext.kernel_for(op, d) for name, d in devices.items()} for op in _ext.op_names()}


def products_are_tf32() -> bool:
    """Whether MLX's own float32 products are TF32 on the default device: on NVIDIA GPUs and M5, unless
    ``MLX_ENABLE_TF32=0``, which MLX reads when it first multiplies."""
    return _ext.products_are_tf32(mx.default_device())


@contextmanager
def plain() -> Iterator[None]:
    """Within it, ops are built from plain MLX ops, as on a device without kernels: to compare, or to find a fault."""
    before = _ext.kernels_enabled()
    _ext.enable_kernels(False)
    try:
        yield
    finally:
        _ext.enable_kernels(before)


def num_threads() -> int:
    """Threads of the CPU kernels; ``MLXSAE_NUM_THREADS`` sets the first value, else the cores this process may use."""
    return _ext.num_threads()


def set_num_threads(n: int) -> None:
    """Sets the threads of the CPU kernels, once nothing is computing. No result depends on it. Raises ``ValueError`` for
    ``n < 1``."""
    _ext.set_num_threads(n)


def unwritten(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array whose memory nobody has written yet, for readers of files to fill (through a NumPy view) before it is
    used: ``mx.zeros`` would write it first.

    Raises:
        ValueError: for a negative length.
    """
    if min(shape, default=0) < 0:
        raise ValueError(f"[unwritten] shape must have no negative length but got {shape}.")
    return _ext.unwritten(shape, dtype)
