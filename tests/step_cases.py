"""Steps of rows by the kernel step_rows, for the CPU kernels and the emulated CUDA kernels, and their oracles.

A step is compared with torch.optim in float64, and stochastic rounding with Philox in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from fused_margin._ops.row_update import NO_COMPLETION, RowStepper, RowUpdate, Rule

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
SIZES = (5, 64, 512, 1030)  # of rows: strided, one piece of a warp, the same in full, several pieces
DTYPES = {  # of the arithmetic, and of the rows
    f"{stored} in {compute}".replace("torch.", ""): (compute, stored)
    for compute in (f32, f64)
    for stored in (f32, f64, bf16)
}
NO_STATE = RowUpdate(None, None, Rule.SGD, 0.3, weight_decay=0.02)
RULES = {
    "sgd": NO_STATE,
    "projected sgd": NO_STATE._replace(project=True),
    "momentum": NO_STATE._replace(beta1=0.9),
    "projected momentum": NO_STATE._replace(beta1=0.9, project=True),
    "nesterov": NO_STATE._replace(beta1=0.9, rule=Rule.NESTEROV),
    "adam": NO_STATE._replace(rule=Rule.ADAM, lr=0.1, beta1=0.8, beta2=0.999, eps=1e-6),
    "projected adam": NO_STATE._replace(rule=Rule.ADAM, lr=0.1, beta1=0.8, beta2=0.999, eps=1e-6, project=True),
    "adamw": NO_STATE._replace(rule=Rule.ADAMW, lr=0.1, beta1=0.8, beta2=0.999, eps=1e-6),
}
STEP_COUNT = 4  # of Adam, this step included
SEED, STEP, FIRST_ROW = 0x1234_5678_9ABC_DEF0, 2**33 + 5, 2**34 + 7


@dataclass
class Rows:
    weight: torch.Tensor
    momentum: torch.Tensor | None
    second_moment: torch.Tensor | None

    @classmethod
    def of(cls, update: RowUpdate, count: int, size: int, dtype: torch.dtype) -> Rows:
        """Random rows with the moments that the rule has."""
        adam = update.rule in (Rule.ADAM, Rule.ADAMW)
        weight, first, second = torch.randn(3, count, size, dtype=f64).to(dtype)
        return cls(weight, first * 0.5 if update.beta1 else None, second.square() if adam else None)

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.weight, self.momentum, self.second_moment) if t is not None]

    def map(self, function) -> Rows:
        each = (self.weight, self.momentum, self.second_moment)
        return Rows(*(None if t is None else function(t) for t in each))

    def copy(self, dtype: torch.dtype | None = None) -> Rows:
        return self.map(lambda t: t.to(dtype or t.dtype, copy=True))


def step(
    run, rows, gradient, update, *, selected=None, added=None, skip=None, into_momentum=False, completion=NO_COMPLETION
):
    """Steps a copy of rows, with the numbers of Adam at STEP_COUNT, and returns it."""
    rows = rows.copy()
    update = update._replace(momentum=rows.momentum, second_moment=rows.second_moment, seed=SEED, step=STEP)
    if update.rule in (Rule.ADAM, Rule.ADAMW):
        update = update._replace(
            correction1=1 - update.beta1**STEP_COUNT, correction2=1 - update.beta2**STEP_COUNT
        )  # fmt: skip
    stepper = RowStepper(run, rows.weight, update, selected=selected, first_row=FIRST_ROW, skip=skip)
    part = {
        "weight": rows.weight, "classes": len(rows.weight), "size": gradient.shape[1], "class_begin": 0,
        "chunk": len(gradient), "gradient": gradient.clone(),
    }  # fmt: skip
    part = {**completion, **{name: value for name, value in part.items() if name not in completion}}
    if into_momentum:
        stepper.add_to_momentum(part)
    else:
        stepper.step(part, added)
    return rows


def expected(rows, gradient, update):
    """The step by torch.optim in float64, from the stored values of the rows."""
    rows = rows.copy(f64)
    parameter = torch.nn.Parameter(rows.weight)
    parameter.grad = gradient.double()
    options = {"lr": update.lr, "weight_decay": update.weight_decay}
    if update.rule in (Rule.ADAM, Rule.ADAMW):
        kind = torch.optim.Adam if update.rule == Rule.ADAM else torch.optim.AdamW
        optimizer = kind([parameter], betas=(update.beta1, update.beta2), eps=update.eps, **options)
        optimizer.state[parameter] = {
            "step": torch.tensor(STEP_COUNT - 1.0), "exp_avg": rows.momentum, "exp_avg_sq": rows.second_moment,
        }  # fmt: skip
    else:
        optimizer = torch.optim.SGD(
            [parameter], momentum=update.beta1, nesterov=update.rule == Rule.NESTEROV, **options
        )  # fmt: skip
        if rows.momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = rows.momentum
    optimizer.step()
    weight = parameter.detach()
    return Rows(F.normalize(weight, dim=1) if update.project else weight, rows.momentum, rows.second_moment)


def assert_close(measured, expected, compute):
    """Within the rounding of the arithmetic, and one of the stored value."""
    for m, e in zip(measured.tensors(), expected.tensors(), strict=True):
        limit = max(3e-6 if compute == f32 else 1e-13, 0.51 * torch.finfo(m.dtype).eps)
        torch.testing.assert_close(m.double(), e.double(), rtol=limit, atol=3e-6 if compute == f32 else 1e-13)


def assert_equal(measured, expected):
    """The same bits, those of NaN included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for m, e in zip(measured.tensors(), expected.tensors(), strict=True):
        assert torch.equal(m.view(kind[m.element_size()]), e.view(kind[e.element_size()]))


def check_steps(run, rule, dtypes):
    """Steps of all rows and of selected rows, rows of zeros included, against torch.optim."""
    (compute, stored), update = DTYPES[dtypes], RULES[rule]
    for size in SIZES:
        rows, gradient = Rows.of(update, 6, size, stored), torch.randn(6, size, dtype=compute)
        added, selected = torch.randn(6, size, dtype=compute), torch.tensor([1, 2, 5])
        for each in (*(t for t in rows.tensors()), gradient, added):
            each[4] = 0
        assert_close(step(run, rows, gradient, update), expected(rows, gradient, update), compute)
        sum_of_both = expected(rows, gradient.double() + added.double(), update)
        measured = step(run, rows, gradient, update, added=added)
        assert_close(measured, sum_of_both, compute)
        assert not any(t[4].any() for t in measured.tensors())

        others = [row for row in range(6) if row not in selected]
        some = step(run, rows, gradient[:3], update, selected=selected)
        part = expected(rows.map(lambda t, at=selected: t[at]), gradient[:3], update)
        assert_close(some.map(lambda t, at=selected: t[at]), part, compute)
        assert_equal(some.map(lambda t, at=others: t[at]), rows.map(lambda t, at=others: t[at]))

        assert_equal(step(run, rows, gradient, update, skip=torch.tensor([True])), rows)
        assert_equal(
            step(run, rows, gradient, update, skip=torch.tensor([False])), step(run, rows, gradient, update)
        )  # fmt: skip


def check_steps_of_momentum_alone(run, dtypes):
    (compute, stored), update = DTYPES[dtypes], RULES["projected momentum"]
    for size in SIZES:
        rows, gradient = Rows.of(update, 5, size, stored), torch.randn(5, size, dtype=compute)
        measured = step(run, rows, gradient, update, into_momentum=True)
        assert torch.equal(measured.weight, rows.weight)
        sums = replace(rows, momentum=update.beta1 * rows.momentum.double() + gradient.double())
        assert_close(measured, sums, compute)


def check_rows_of_nan(run):
    """A row with NaN or infinity becomes NaN, and the others do not change with it."""
    update = RULES["projected momentum"]
    for size in SIZES:
        rows, gradient = Rows.of(update, 4, size, f32), torch.randn(4, size)
        regular = step(run, rows, gradient, update)
        gradient[1, size - 1], gradient[2, 0] = torch.nan, torch.inf
        measured = step(run, rows, gradient, update)
        assert measured.weight[1:3].isnan().all()
        at = [0, 3]
        assert_equal(measured.map(lambda t, at=at: t[at]), regular.map(lambda t, at=at: t[at]))


def philox(counter, key):
    """Philox4x32-10 of uint64 arrays of 32-bit words: counter (..., 4), key (2,)."""
    x = [counter[..., k].astype(np.uint64) for k in range(4)]
    key = [int(k) for k in key]
    low, shift = np.uint64(0xFFFF_FFFF), np.uint64(32)
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            second >> shift ^ x[1] ^ np.uint64(key[0]), second & low,
            first >> shift ^ x[3] ^ np.uint64(key[1]), first & low,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(x, axis=-1)


def check_philox_itself():
    """The known answers of Random123."""
    zeros, ones = np.zeros(4, dtype=np.uint64), np.full(4, 0xFFFF_FFFF, dtype=np.uint64)
    answers = philox(zeros, zeros[:2]).tolist(), philox(ones, ones[:2]).tolist()
    assert answers[0] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert answers[1] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def random_bits(count, size, seed=SEED):
    """The 16 bits that round the weight, the first and the second moment of every element: three of (count, size)."""
    counter = np.zeros((count, (size + 3) // 4, 4), dtype=np.uint64)
    for row in range(count):
        r = FIRST_ROW + row
        counter[row, :, 0] = np.arange(counter.shape[1])
        counter[row, :, 1:] = r % 2**32, STEP % 2**32, (r >> 32) << 16 | STEP >> 32
    words = philox(counter, (seed % 2**32, seed >> 32)).reshape(count, -1)[:, :size].astype(np.int64)
    of_second = words >> 16 ^ words * 0x9E3779B1 & 0xFFFF_FFFF
    return [torch.from_numpy(each & 0xFFFF) for each in (words, words >> 16, of_second)]


def as_integers(rows):
    return rows.view(torch.int16).int()


def assert_nearly_same_bits(measured, expected):
    """Arithmetic in another order can change the last place of a float32 value, and so seldom its rounding."""
    different, count = 0, 0
    for m, e in zip(measured.tensors(), expected.tensors(), strict=True):
        m, e = as_integers(m), as_integers(e)
        assert ((m - e).abs() <= 1).all()
        different, count = different + int((m != e).sum()), count + m.numel()
    assert different <= 0.01 * count


def check_stochastic_rounding(run, rule, compute):
    """Values in the type of the arithmetic, rounded in Python by the bits that the comments of the kernel promise."""
    update = RULES[rule]
    for size in SIZES:
        rows, gradient = Rows.of(update, 5, size, bf16), torch.randn(5, size, dtype=compute)
        exact = step(run, rows.copy(compute), gradient, update)
        bits = iter(random_bits(5, size))
        rounded = exact.map(lambda t, bits=bits: stochastic(t, next(bits)))
        measured = step(run, rows, gradient, update._replace(stochastic=True))
        if update.momentum is None and rows.momentum is None:
            assert measured.momentum is None
        assert_nearly_same_bits(measured, rounded)


def stochastic(values, bits):
    words = values.float().view(torch.int32).long() & 0xFFFF_FFFF
    return ((words + bits) >> 16).short().view(bf16)


def check_unbiased_rounding(run):
    """The mean of many roundings is the exact value, and roundings of weight and moments are independent."""
    update, count, size = RULES["adam"], 1500, 12
    one, gradient = Rows.of(update, 1, size, bf16), torch.randn(1, size)
    exact = step(run, one.copy(f32), gradient, update)
    many = step(
        run, one.map(lambda t: t.expand(count, size).contiguous()), gradient.repeat(count, 1),
        update._replace(stochastic=True),
    )  # fmt: skip
    errors = []
    for values, value in zip(many.tensors(), exact.tensors(), strict=True):
        error = values.double() - value.double()
        unit = value.double().abs().log2().floor().sub(7).exp2()  # of the last place in bfloat16
        assert (error.abs() < unit).all()
        assert (error.mean(0).abs() < 5 * unit / 2 / count**0.5).all()
        errors.append((error - error.mean(0)) / unit)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        covariance = (errors[a] * errors[b]).mean()
        scale = (errors[a].square().mean() * errors[b].square().mean()).sqrt()
        assert covariance.abs() < 5 * scale / (count * size) ** 0.5
