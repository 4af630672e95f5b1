"""The definitions in NumPy float64, written from the equations; nothing here touches MLX or mlxsae."""

from __future__ import annotations

import numpy as np

# Relative tolerances of values by dtype: the rounding of one result, with room for the accumulation in float32.
RTOL = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def pre_acts(x, w_enc, b_enc=None):
    z = x.astype(np.float64) @ w_enc.astype(np.float64).T
    return z if b_enc is None else z + b_enc.astype(np.float64)


def topk_encode(x, w_enc, b_enc, k):
    """(values, indices, pre-activations): the k largest, ties to the lowest index, ascending in each row, then relu."""
    z = pre_acts(x, w_enc, b_enc)
    indices = np.sort(np.argsort(-z, axis=1, kind="stable")[:, :k], axis=1)
    return np.maximum(np.take_along_axis(z, indices, 1), 0), indices, z


def compressed(kept, z):
    """(values, indices, offsets) of the entries of z that are kept, by row and feature."""
    rows, indices = np.nonzero(kept)
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int64)
    return z[rows, indices], indices, offsets


def batch_topk_encode(x, w_enc, b_enc, k):
    """(values, indices, offsets, threshold, z): the k * n largest after relu, ties to the lowest place, only positive ones."""
    z = pre_acts(x, w_enc, b_enc)
    f = np.maximum(z, 0)
    kept = np.zeros(z.size, bool)
    kept[np.argsort(-f, axis=None, kind="stable")[: k * z.shape[0]]] = True
    kept = kept.reshape(z.shape) & (f > 0)
    return *compressed(kept, z), z[kept].min() if kept.any() else 0.0, z


def threshold_encode(x, w_enc, b_enc, threshold):
    z = np.where(np.isnan(threshold), np.nan, pre_acts(x, w_enc, b_enc))
    return compressed(np.isnan(z) | ((z > threshold) & (z > 0)), z)


def csr_to_slots(values, indices, offsets):
    """The same code with as many slots for each row as the longest needs."""
    lengths = np.diff(offsets)
    k = int(lengths.max(initial=1))
    v, i = np.zeros((len(lengths), k)), np.zeros((len(lengths), k), np.int64)
    for t, m in enumerate(lengths):
        v[t, :m] = values[offsets[t] : offsets[t + 1]]
        i[t, :m] = indices[offsets[t] : offsets[t + 1]]
    return v, i


def float32_error_bound(x, w_enc, b_enc):
    """Largest error of a float32 dot product of this length, for each row and feature: gamma_{d+1} * |x| . |w|."""
    d = x.shape[1]
    unit = 2.0**-24
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w_enc).astype(np.float64).T
    if b_enc is not None:
        magnitude = magnitude + np.abs(b_enc).astype(np.float64)
    return (d + 1) * unit / (1 - (d + 1) * unit) * magnitude


def same_selection(z, bound, indices, k):
    """Sets may differ from the exact one only where the float64 gap is below the float32 error bound.

    Returns the rows that violate it.
    """
    bad = []
    for t in range(z.shape[0]):
        chosen = np.zeros(z.shape[1], bool)
        chosen[indices[t]] = True
        if chosen.sum() != k:
            bad.append(t)
            continue
        if k == z.shape[1]:
            continue
        lowest = np.where(chosen, z[t] + bound[t], np.inf).min()
        highest = np.where(chosen, -np.inf, z[t] - bound[t]).max()
        if highest > lowest:
            bad.append(t)
    return bad


def to_dense(values, indices, d_sae):
    dense = np.zeros((values.shape[0], d_sae))
    for t in range(values.shape[0]):
        np.add.at(dense[t], indices[t], values[t].astype(np.float64))
    return dense


def sparse_decode(values, indices, w_dec, b_dec=None):
    out = to_dense(values, indices, w_dec.shape[0]) @ w_dec.astype(np.float64)
    return out if b_dec is None else out + b_dec.astype(np.float64)


def gather_dot(rows, weight, indices):
    full = rows.astype(np.float64) @ weight.astype(np.float64).T
    return np.take_along_axis(full, indices.astype(np.int64), 1)


def sparse_outer(values, indices, rows, d_sae):
    return to_dense(values, indices, d_sae).T @ rows.astype(np.float64)


def tokens_since_fired(counts, values, indices, n_tokens):
    fired = set(indices[(values > 0) | np.isnan(values)].tolist())
    older = np.minimum(counts.astype(np.int64) + n_tokens, 2**31 - 1)
    return np.array([0 if j in fired else older[j] for j in range(len(counts))])


def adam(w, m, v, g, *, lr, step, betas=(0.9, 0.999), eps=1e-8):
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def scattered(x):
    """Wellons' lowbias32, on uint32."""
    x = np.asarray(x, np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint32(shift))).astype(np.uint64) * factor & 0xFFFFFFFF).astype(np.uint32)
    return x ^ (x >> np.uint32(16))


def stochastic_bfloat16(moment, *, step, matrix, second):
    """The bits of a matrix's moment in bfloat16. matrix: 0 encoder, 1 decoder; second: of the two moments.

    With f the place of the float32 number between its neighbours in bfloat16, it goes away from 0 where a 16-bit random
    number r in [0, 1) has f + r >= 1.
    """
    rows, columns = (np.arange(n, dtype=np.uint32) for n in moment.shape)
    noise = scattered(scattered(scattered(2 * step + matrix) ^ rows)[:, None] + columns)
    r = (noise >> np.uint32(16) if second else noise & np.uint32(0xFFFF)) / 2**16
    bits = np.ascontiguousarray(moment, np.float32).view(np.uint32)
    toward, f = bits >> np.uint32(16), (bits & np.uint32(0xFFFF)) / 2**16
    return np.where(np.isnan(moment), 0x7FC0, toward + (f + r >= 1)).astype(np.uint16)


def feature_update(x, terms, params, m, v, *, lr, step, project, normalize, b_dec_to_input, clip_norm):
    """One training step with dense gradients. terms: (residual, values, indices, scale); params: dict of arrays."""
    w_enc, w_dec = params["w_enc"], params["w_dec"]
    d_sae = w_enc.shape[0]
    g = {name: np.zeros_like(a) for name, a in params.items()}
    for q, (residual, values, indices, scale) in enumerate(terms):
        used = to_dense((values > 0).astype(np.float64), indices, d_sae)
        f = to_dense(np.where(values > 0, values, 0), indices, d_sae)
        out_grad = scale * residual
        dz = (out_grad @ w_dec.T) * used
        g["w_dec"] += f.T @ out_grad
        g["w_enc"] += dz.T @ x
        g["b_enc"] += dz.sum(0)
        if q == 0:
            g["b_dec"] += out_grad.sum(0)
        if b_dec_to_input:
            g["b_dec"] -= (dz @ w_enc).sum(0)
    if project:
        g["w_dec"] -= (g["w_dec"] * w_dec).sum(1, keepdims=True) * w_dec
    norm = np.sqrt(sum((a**2).sum() for a in g.values()))
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    new = {n: adam(params[n], m[n], v[n], factor * g[n], lr=lr, step=step) for n in params}
    out = [{n: new[n][i] for n in params} for i in range(3)]
    if normalize:
        out[0]["w_dec"] = out[0]["w_dec"] / np.linalg.norm(out[0]["w_dec"], axis=1, keepdims=True)
    return (*out, norm)
