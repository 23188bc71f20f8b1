"""The maths of every op, once: value and derivative side by side.

Gates   f(x, c, p) -> y, code             x as stored, c = x in the compute type, p = operands and numbers
                                          code: dy/dx, which is 0 or 1; or two bits, from which
        f_backward(g, code, p) -> dx, dt  g = upstream gradients, one per output; dt = the elementwise gradient of the threshold
        f(x, c, p) -> y, dy/dx            for a gate that saves its input
Bases   f(x, y, p, s) -> l, dl/dx, q, dq  q is the prediction a rule looks at, dq = dq/dx; s = the base's static settings
Rules   f(l, dl, x, y, q, dq, p, s) -> w*l and its derivative; s = the kind of the base's input, then the rule's static settings

Every selection is written over an explicit comparison, so that NaN falls where the contract says and copies stay copies.
"""

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------- gates


@triton.jit
def threshold(x, c, p):
    """y = value where x <= t else x."""
    t, value = p[0], p[1]
    drop = c <= t.to(c.dtype)
    return tl.where(drop, value.to(x.dtype), x), tl.where(drop, 0, 1)


@triton.jit
def hardshrink(x, c, p):
    """y = 0 where -t <= x <= t else x."""
    t = p[0].to(c.dtype)
    drop = (c >= -t) & (c <= t)
    return tl.where(drop, 0.0, x), tl.where(drop, 0, 1)


@triton.jit
def softshrink(x, c, p):
    """y = x - t where x > t, x + t where x < -t, x where x is NaN, else 0."""
    t = p[0].to(c.dtype)
    above = c > t
    below = c < -t
    y = tl.where(above, c - t, tl.where(below, c + t, tl.where(c != c, c, 0.0)))
    return y, tl.where(above | below | (c != c), 1, 0)


@triton.jit
def garrote(x, c, p):
    """y = (|x| - t)(|x| + t) / x where |x| > t, x where x is NaN, else 0; dy/dx = 1 + (t / x)**2.

    t / |x| is at most 1, so nothing overflows; |x| - t is exact near t.
    """
    t = p[0].to(c.dtype)
    t = tl.where(t < 0.0, 0.0, t)  # which a tensor may hold
    size = tl.abs(c)
    above = size > t
    safe = tl.where(above, size, 1.0)
    if c.dtype == tl.float64:
        r = t / safe
    else:
        root = tl.rsqrt(safe)  # a division takes ten instructions more; squared first, it would overflow for denormals
        r = t * root * root
    r = tl.where(above, r, 0.0)
    shrunk = (size - t) * (1.0 + r)
    y = tl.where(above, tl.where(c < 0.0, -shrunk, shrunk), tl.where(c != c, c, 0.0))
    return y, tl.where(above | (c != c), 1.0 + r * r, 0.0)


@triton.jit
def _firm_steepness(low, high):
    """high / (high - low): 1 for an infinite high. Between equal thresholds lies nothing, and any number serves."""
    apart = low < high
    steep = tl.where(apart, high, 1.0) / tl.where(apart, high - low, 1.0)
    return tl.where(high < float("inf"), steep, 1.0)


@triton.jit
def firm(x, c, p):
    """y = x where |x| > high, sign(x) high (|x| - low) / (high - low) where |x| > low, x where x is NaN, else 0.

    The code is 1 where x is kept, 2 where it is shrunk.
    """
    low, high = p[0].to(c.dtype), p[1].to(c.dtype)
    size = tl.abs(c)
    kept = (size > high) | (c != c)
    shrunk = size > low
    y = tl.where(shrunk, size - low, 0.0) * _firm_steepness(low, high)
    y = tl.where(shrunk, tl.where(c < 0.0, -y, y), 0.0)
    return tl.where(kept, c, y), tl.where(kept, 1, tl.where(shrunk, 2, 0))


@triton.jit
def firm_backward(g, code, p):
    """dx = g where kept, high / (high - low) g where shrunk; there is no dt."""
    steep = _firm_steepness(p[0].to(g[0].dtype), p[1].to(g[0].dtype))
    dx = tl.where((code & 1) != 0, g[0], tl.where((code & 2) != 0, g[0] * steep, 0.0))
    return dx, tl.zeros_like(dx)


@triton.jit
def keep_large(x, c, p):
    """y = x where |x| > t or x is NaN else 0; that is 0 where |x| <= t, with inf for a t of NaN."""
    t = p[0].to(c.dtype)
    drop = tl.abs(c) <= tl.where(t != t, float("inf"), t)
    return tl.where(drop, 0.0, x), tl.where(drop, 0, 1)


@triton.jit
def binary_threshold(x, c, p):
    """y = above where x > t else below; dy/dx = 0."""
    t, above, below = p[0], p[1], p[2]
    return tl.where(c > t.to(c.dtype), above, below), tl.zeros_like(c).to(tl.int32)


# ------------------------------------------------------------------------------------------- gates whose threshold learns


@triton.jit
def softshrink_learned(x, c, p):
    """softshrink's y; the code is 0 where it drops x, 2 above t, 3 below -t, 1 where x is NaN."""
    t = p[0].to(c.dtype)
    y, _ = softshrink(x, c, p)
    return y, tl.where(c > t, 2, tl.where(c < -t, 3, tl.where(c != c, 1, 0)))


@triton.jit
def softshrink_learned_backward(g, code, p):
    """dx = g where kept; dt = -g above, +g below, 0 elsewhere (a kept NaN included)."""
    signed = tl.where((code & 1) != 0, g[0], -g[0])
    return tl.where(code != 0, g[0], 0.0), tl.where((code & 2) != 0, signed, 0.0)


@triton.jit
def _above(c, p):
    """1 where x > t; 2 where |x - t| < bandwidth / 2, the window in which t gets a gradient; the sum of both."""
    t, bandwidth = p[0].to(c.dtype), p[1].to(c.dtype)
    above = c > t
    return above, tl.where(above, 1, 0) | tl.where(tl.abs(c - t) < 0.5 * bandwidth, 2, 0)


@triton.jit
def jumprelu(x, c, p):
    """y = x where x > t else 0."""
    above, code = _above(c, p)
    return tl.where(above, x, 0.0), code


@triton.jit
def jumprelu_backward(g, code, p):
    """dx = g where x > t; dt = -(t / bandwidth) g inside the window."""
    steep = p[0].to(g[0].dtype) * (1.0 / p[1].to(g[0].dtype))
    return tl.where((code & 1) != 0, g[0], 0.0), tl.where((code & 2) != 0, -steep * g[0], 0.0)


@triton.jit
def step(x, c, p):
    """y = 1 where x > t else 0."""
    above, code = _above(c, p)
    return tl.where(above, 1.0, 0.0), code


@triton.jit
def step_backward(g, code, p):
    """dx = 0; dt = -g / bandwidth inside the window."""
    dt = tl.where((code & 2) != 0, -g[0] * (1.0 / p[1].to(g[0].dtype)), 0.0)
    return tl.zeros_like(dt), dt


@triton.jit
def jumprelu_l0_backward(g, code, p):
    """The gradients of jumprelu, and of the step that the count sums, whose gradient is g[1]."""
    dx, dt = jumprelu_backward(g, code, p)
    _, dt_count = step_backward((g[1],), code, p)
    return dx, dt + dt_count


# --------------------------------------------------------------------------------------------------------------- losses


@triton.jit
def mse(x, y, p, s):
    """l = (x - y)**2, dl/dx = 2 (x - y)."""
    d = x - y
    return d * d, 2.0 * d, x, 1.0


@triton.jit
def huber(x, y, p, s):
    """l = d**2 / 2 where |d| <= delta else delta (|d| - delta / 2) for d = x - y; dl/dx = d held to -delta and delta."""
    d, delta = x - y, p[0].to(x.dtype)
    size = tl.abs(d)
    near = size <= delta
    slope = tl.where(near, d, tl.where(d > 0.0, delta, tl.where(d < 0.0, -delta, d)))
    return tl.where(near, 0.5 * d * d, delta * (size - 0.5 * delta)), slope, x, 1.0


@triton.jit
def _log_polynomial(f):
    """log(1 + f) = f - f**2 / 2 + f**3 P(f) for float32 f in [sqrt(1/2) - 1, sqrt(2) - 1]; relative error 9.4e-8."""
    q = 0.08700116723775864 * f - 0.14267438650131226
    q = q * f + 0.14914847910404205
    q = q * f - 0.16577591001987457
    q = q * f + 0.19963057339191437
    q = q * f - 0.2500133812427521
    q = q * f + 0.3333390951156616
    q = q * f - 0.5
    return q * (f * f) + f


@triton.jit
def _logs(x):
    """log x and log(1 - x), clamped at -100, for x in [0, 1]; other x give some number. Half the instructions of two tl.log.

    float32: v = 2**k m with m in [sqrt(1/2), sqrt(2)), log v = k log 2 + log(1 + f), f = m - 1. x is scaled by 2**23, so that
    denormals count; for k = 0 log(1 - x) takes f = -x, which 1 - x has rounded. float64: that rounding is added again.
    """
    rest = 1.0 - x
    if x.dtype == tl.float64:
        log_x = tl.log(tl.abs(x))
        log_rest = tl.log(rest) + ((1.0 - rest) - x)
    else:
        bits = (tl.abs(x) * 8388608.0).to(tl.int32, bitcast=True)
        k = (bits - (0x3F3504F3 + 0x0B800000)) >> 23
        f = (bits - 0x0B800000 - (k << 23)).to(tl.float32, bitcast=True) - 1.0
        log_x = 0.6931471805599453 * k.to(tl.float32) + _log_polynomial(f)
        bits = rest.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
        f = tl.where(k == 0, -x, f)
        log_rest = 0.6931471805599453 * k.to(tl.float32) + _log_polynomial(f)
    return tl.maximum(log_x, -100.0), tl.where(rest == 0.0, -100.0, log_rest)


@triton.jit
def bce(x, y, p, s):
    """l = -(y log x + (1 - y) log(1 - x)), logs clamped at -100; dl/dx = (x - y) / max(x (1 - x), 1e-12); NaN where x or y lies
    outside [0, 1].

    x (1 - x) >= 0 just where 0 <= x <= 1. Elsewhere y becomes NaN, and with it loss and slope: the logs are finite.
    """
    variance = x * (1.0 - x)
    y = tl.where((variance >= 0.0) & (y - y * y >= 0.0), y, float("nan"))
    log_x, log_rest = _logs(x)
    loss = -(y * log_x + (1.0 - y) * log_rest)
    variance = tl.maximum(variance, tl.full([], 1e-12, x.dtype))  # a bare 1e-12 would be a float32
    if x.dtype == tl.float64:
        slope = (x - y) / variance
    else:
        r = tl.rsqrt(variance)
        slope = (x - y) * (r * r)
    return loss, slope, x, 1.0


@triton.jit
def _softplus_neg_abs(e):
    """log1p(e) for e = exp(-|x|) in [0, 1].

    float32: e times a polynomial of degree 8 in e, relative error 2.1e-7. float64: log(u) e / (u - 1) with u = fl(1 + e).
    """
    if e.dtype == tl.float64:
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        q = 0.005232624243944883 * e - 0.029504956677556038
        q = q * e + 0.07822549343109131
        q = q * e - 0.1366320699453354
        q = q * e + 0.1910598874092102
        q = q * e - 0.2484297752380371
        q = q * e + 0.3331909477710724
        q = q * e - 0.4999949336051941
        q = q * e + 0.9999999403953552
        log1p = e * q
    return log1p


@triton.jit
def bce_with_logits(x, y, p, s):
    """l = (1 - y) x + w (max(-x, 0) + log1p(exp -|x|)) with w = 1 + (pos_weight - 1) y; dl/dx = (1 - y) - w (1 - s).

    One exp2 serves softplus and sigmoid s, and rsqrt(1 + e)**2 replaces a division. The prediction near 0 is s = 1/2 + x / 4
    (to x**3 / 48), which crosses 1/2 just where x crosses 0; rsqrt(2)**2 does not.
    """
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
    else:
        e = tl.exp2(-1.4426950408889634 * tl.abs(x))
        r = tl.rsqrt(1.0 + e)
        r = r * r
    s = tl.where(x >= 0.0, r, e * r)
    softplus = tl.maximum(-x, 0.0) + _softplus_neg_abs(e)  # a NaN that maximum drops comes back through e
    slope = s - y
    if len(p) == 1:
        w = 1.0 + (p[0].to(x.dtype) - 1.0) * y
        softplus *= w
        slope = (1.0 - y) - w * tl.where(x >= 0.0, e * r, r)
    q = s
    if x.dtype != tl.float64:
        q = tl.where(tl.abs(x) < 0.004, 0.5 + 0.25 * x, s)
    return (1.0 - y) * x + softplus, slope, q, e * r * r


# ---------------------------------------------------------------------------------------------------------------- rules


@triton.jit
def unweighted(loss, slope, x, y, q, dq, p, s):
    """w = 1."""
    return loss, slope


@triton.jit
def by_prediction(loss, slope, x, y, q, dq, p, s):
    """w = above where x >= t else below."""
    w = tl.where(x >= p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype))
    return loss * w, slope * w


@triton.jit
def by_outcome(loss, slope, x, y, q, dq, p, s):
    """w = the weight of the cell: x >= t or not, positive or not; positive where y > target_threshold, or on values y >= t."""
    t = p[0].to(x.dtype)
    if s[0] == "values":
        positive = y >= t
    else:
        positive = y > p[5].to(x.dtype)
    found = tl.where(positive, p[1].to(x.dtype), p[2].to(x.dtype))
    missed = tl.where(positive, p[3].to(x.dtype), p[4].to(x.dtype))
    w = tl.where(x >= t, found, missed)
    return loss * w, slope * w


@triton.jit
def by_proximity(loss, slope, x, y, q, dq, p, s):
    """w = 1 + factor (1 - d / range) where d = |q - t| < range, else 1; dw/dq = -(factor / range) sign(q - t), sign(0) = 0."""
    t, reach, factor = p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype)
    u = q - t
    d = tl.abs(u)
    near = d < reach
    inverse = 1.0 / reach
    w = tl.where(near, 1.0 + factor * (1.0 - d * inverse), 1.0)
    steep = factor * inverse * dq
    dw = tl.where(u > 0.0, -steep, tl.where(u < 0.0, steep, 0.0))
    pull = tl.where(dw == 0.0, 0.0, loss * dw)  # the loss may be inf
    return loss * w, tl.where(near, slope * w + pull, slope)


@triton.jit
def by_loss(loss, slope, x, y, q, dq, p, s):
    """w = factor where l > bound else 1."""
    heavy = loss > p[0].to(x.dtype)
    factor = p[1].to(x.dtype)
    return tl.where(heavy, loss * factor, loss), tl.where(heavy, slope * factor, slope)
