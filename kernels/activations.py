"""The vocabulary of the cells for Triton: the names of `fusedrnn.cells.vocabulary`.

sigmoid, tanh and softplus are built from `exp(-|x|)`, which lies in [0, 1], so nothing overflows,
and infinities and NaN need no case of their own. Largest relative errors against float64, over all
float32 values, with a correctly rounded exponential and division (eps = 2**-23):

    sigmoid    2 eps         from x = -87 on; below, exp underflows, and the result is at most
                             2**-126 away from the true one
    tanh       2.5 eps       subnormals included: tanh(x) is x there
    softplus   3.5 eps       from x = -87 on, as sigmoid
    log1p      3.5 eps       subnormals included
    exp, log   2 eps         numpy's own, in the interpreter; on a GPU log is CUDA's logf, 1 eps
    sqrt       eps / 2       correctly rounded

The GPU's ex2.approx adds up to 2 ulp, and the rounding of |x| * log2(e) up to |x| eps / 2, in
exp. In sigmoid, tanh and softplus that is absolutely less than 1e-7 everywhere; of exp itself it is
relative: 1e-6 for |x| up to 12, 6e-6 at the ends of its range.
"""

import triton
import triton.language as tl

from fusedrnn.cells import vocabulary


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    # Near 0, 1 - exp(-2|x|) would cancel: an odd polynomial (Cephes' tanhf, S. Moshier) instead.
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = x + x * (z * p)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def relu(x):
    # Not maximum(x, 0), which may drop NaN: a comparison with NaN is false, so NaN is kept.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    # W. Kahan's: what 1 + x loses to rounding, log(1 + x) / (1 + x - 1) loses as well.
    u = 1.0 + x
    near = tl.where(u == 1.0, 1.0, u - 1.0)
    far = tl.where(u < float("inf"), tl.log(u) * (x / near), u)
    return tl.where(u == 1.0, x, far)


@triton.jit
def softplus(x):
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rsqrt(x):
    # Not tl.rsqrt, which is an approximation: it loses two bits where the division loses one.
    return 1.0 / tl.sqrt_rn(x)


@triton.jit
def zeros_like(x):
    return (x.to(tl.int32, bitcast=True) & 0).to(tl.float32, bitcast=True)


VOCABULARY = {name: globals()[name] for name in vocabulary.NAMES}
