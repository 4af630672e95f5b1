"""Row-sparse Adam is torch's, on the gradients of autodiff."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxsae import ops

pytestmark = pytest.mark.peers


def test_features_without_entries_stay_as_under_sparse_adam() -> None:
    """Rows of both matrices and the encoder's bias by torch.optim.SparseAdam, b_dec by torch.optim.Adam; 30 steps."""
    rng = np.random.default_rng(0)
    n, d, d_sae, k, betas, lr = 5, 12, 80, 3, (0.9, 0.99), 1e-2
    start = {
        "w_enc": rng.standard_normal((d_sae, d)), "b_enc": 0.1 * rng.standard_normal(d_sae),
        "w_dec": rng.standard_normal((d_sae, d)), "b_dec": rng.standard_normal(d),
    }  # fmt: skip
    params = ops.Params(**{name: mx.array(a.astype(np.float32)) for name, a in start.items()})
    m = v = ops.Params(*map(mx.zeros_like, params))
    theirs = {name: torch.nn.Parameter(torch.tensor(a, dtype=torch.float64)) for name, a in start.items()}
    sparse = torch.optim.SparseAdam(
        [theirs[name] for name in ("w_enc", "b_enc", "w_dec")], lr=lr, betas=betas
    )
    dense = torch.optim.Adam([theirs["b_dec"]], lr=lr, betas=betas)
    for step in range(1, 31):
        x = rng.standard_normal((n, d)).astype(np.float32)
        code = ops.topk_encode(mx.array(x), params.w_enc, params.b_enc, k=k)
        residual, square = ops.decode_residual(code, params.w_dec, mx.array(x), params.b_dec)
        params, m, v, *_ = ops.feature_update(
            mx.array(x), [ops.Term(residual, code, mx.array(2 / n))], params, m, v, loss=square.mean(), lr=lr,
            step=step, betas=betas, project_decoder=False, normalize_decoder=False, untouched="keep",
        )  # fmt: skip

        rows, values = torch.tensor(np.array(code.indices).astype(np.int64)), np.array(code.values)
        target = torch.tensor(x, dtype=torch.float64)
        z = (target[:, None] * theirs["w_enc"][rows]).sum(-1) + theirs["b_enc"][rows]
        f = torch.where(torch.tensor(values > 0), z, 0.0)
        np.testing.assert_allclose(values, f.detach().numpy(), atol=1e-4)
        loss = ((f[..., None] * theirs["w_dec"][rows]).sum(1) + theirs["b_dec"] - target).square().sum() / n
        sparse.zero_grad(), dense.zero_grad()
        loss.backward()
        used = rows[torch.tensor(values > 0)].unique()
        for name in ("w_enc", "b_enc", "w_dec"):
            grad = theirs[name].grad
            theirs[name].grad = torch.sparse_coo_tensor(
                used[None], grad[used], grad.shape, check_invariants=True
            )
        sparse.step(), dense.step()
    for name, mine in params._asdict().items():
        np.testing.assert_allclose(
            np.array(mine), theirs[name].detach().numpy(), rtol=1e-3, atol=1e-4, err_msg=name
        )
    assert (np.array(v.b_enc) == 0).any()
