"""The maths of every op, once: value and derivative side by side.

Gates   f(x, c, p) -> y, code             x as stored, c = x in the compute type, p = operands and numbers
                                          code: dy/dx, which is 0 or 1; or two bits, from which
        f_backward(g, code, p) -> dx, dt  g = upstream gradients, one per output; dt = the elementwise gradient of the threshold
        f(x, c, p) -> y, dy/dx            for a gate that saves its input
Bases   f(x, y, p, s) -> l, dl/dx, q, 1 - q, dq
                                          q is the prediction a rule looks at, dq = dq/dx
                                          s = is every target 0 or 1 (an integer's value may be others, though), then the base's
                                          constants, OPERAND for each that is an operand of p
Rules   f(l, dl, x, y, q, 1 - q, dq, p, s) -> w*l and its derivative
                                          s = the kind of the base's input, then the rule's constants, likewise

Every selection is written over an explicit comparison, so that NaN falls where the contract says and copies stay copies.
"""

import triton
import triton.language as tl

OPERAND = tl.constexpr(-1)
LOG_2 = tl.constexpr(0.6931471805599453)

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
    t = tl.where(t == t, t + 0.0, float("inf"))  # an x of -0.0 would keep its sign beside a t of -0.0
    y = tl.where(c <= t, tl.minimum(c + t, 0.0), c - t)  # a NaN that inf - inf makes is dropped
    return y, tl.where(tl.abs(c) <= t, 0, 1)


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
        # A division takes ten instructions more. A GPU's rsqrt takes denormals for 0, so they are scaled; of the forms that do
        # so, this one does not spill.
        root = tl.rsqrt(safe)
        root = tl.where(safe < 1.1754943508222875e-38, 4096.0 * tl.rsqrt(16777216.0 * safe), root)
        r = t * root * root
    r = tl.where(above, r, 0.0)
    shrunk = (size - t) * (1.0 + r)
    y = tl.where(above, tl.where(c < 0.0, -shrunk, shrunk), tl.where(c != c, c, 0.0))
    return y, tl.where(above | (c != c), tl.fma(r, r, 1.0), 0.0)


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
    above, below = c > t, c < -t  # for the code, so that softshrink's form takes more instructions
    y = tl.where(above, c - t, tl.where(below, c + t, tl.where(c != c, c, 0.0)))
    return y, tl.where(above, 2, tl.where(below, 3, tl.where(c != c, 1, 0)))


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
def _minus(x):
    """-x as a sign that the next instruction takes. Triton's own is 0 - x, an instruction."""
    return x * -1.0


@triton.jit
def _is_probability(y):
    return tl.fma(_minus(y), y, y) >= 0.0


@triton.jit
def mse(x, y, p, s):
    """l = (x - y)**2, dl/dx = 2 (x - y)."""
    d = x - y
    return d * d, 2.0 * d, x, 1.0 - x, 1.0


@triton.jit
def huber(x, y, p, s):
    """l = d**2 / 2 where |d| <= delta else delta (|d| - delta / 2) for d = x - y: c (d - c / 2), c = d held to -delta and delta.

    dl/dx = c.
    """
    d, delta = x - y, p[0].to(x.dtype)
    held = tl.minimum(d, delta, propagate_nan=tl.PropagateNan.ALL)
    held = tl.maximum(held, -delta, propagate_nan=tl.PropagateNan.ALL)
    return held * tl.fma(held, -0.5, d), held, x, 1.0 - x, 1.0


@triton.jit
def _asinh_factor(h):
    """2 asinh(v / 2) / v for float32 h = v**2 up to 1/2, relative error 5.5e-8.

    2 asinh(v / 2) is log1p(e) for v = e rsqrt(1 + e), and -log(1 - s) for v = s rsqrt(1 - s). A polynomial in e takes three
    instructions more.
    """
    q = tl.fma(h, -0.0005965743912383914, 0.0046594650484621525)
    q = tl.fma(q, h, -0.04166441038250923)
    return tl.fma(q, h, 1.0)


@triton.jit
def _split(v, EXTRA: tl.constexpr = 0):
    """2**23 k, m, 1 / sqrt(m) and 2**EXTRA / v for float32 v = 2**(k + EXTRA) m from 2**-126 on, m in [sqrt(1/2), sqrt(2)).

    Other v give some numbers. The exponent stays in its place, which spares a shift.
    """
    bits = v.to(tl.int32, bitcast=True) - (EXTRA << 23)
    k = (bits - 0x3F3504F3) & -0x800000
    m = (bits - k).to(tl.float32, bitcast=True)
    root = tl.rsqrt(m)
    inverse = ((root * root).to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True)
    return k.to(tl.float32), m, root, inverse


@triton.jit
def _log_of(k, f, root, UNIT: tl.constexpr):
    """log(2**k (1 + f)) UNIT for float32 f in [sqrt(1/2) - 1, sqrt(2) - 1], root = 1 / sqrt(1 + f), and 2**23 k.

    log(1 + f) is 2 asinh(v / 2) for v = f root: v times a polynomial of degree 2 in v**2, relative error 4.6e-8.
    """
    v = f * root
    h = v * v
    q = tl.fma(h, 0.004572396632283926 * UNIT, -0.04166238382458687 * UNIT)
    return tl.fma(k, UNIT * LOG_2 / 8388608, v * tl.fma(q, h, UNIT))


@triton.jit
def _logs(small, large):
    """log small, clamped at -100, and log large for small = 1 - large in [0, 1/2]; others give some numbers.

    float32: small is scaled by 2**23, so that denormals count; log large takes the exact one. float64: log large has the rounding
    of 1 - small added again.
    """
    if small.dtype == tl.float64:
        log_small = tl.log(tl.abs(small))
        log_large = tl.log(large) + ((1.0 - large) - small)
    else:
        k, m, root, _ = _split(tl.abs(small) * 8388608.0, 23)
        log_small = _log_of(k, m - 1.0, root, 1.0)
        v = small * tl.rsqrt(large)
        log_large = _minus(v) * _asinh_factor(v * v)
    return tl.maximum(log_small, -100.0), log_large


@triton.jit
def bce(x, y, p, s):
    """l = -(y log x + (1 - y) log(1 - x)), logs clamped at -100; dl/dx = (x - y) / max(x (1 - x), 1e-12); NaN where x or y lies
    outside [0, 1].

    x (1 - x) >= 0 just where 0 <= x <= 1. Elsewhere y becomes NaN, and with it loss and slope.
    """
    rest = 1.0 - x
    variance = x * rest
    y = tl.where((variance >= 0.0) & _is_probability(y), y, float("nan"))
    log_small, log_large = _logs(tl.minimum(x, rest), tl.maximum(x, rest))
    share = tl.where(x < rest, y, 1.0 - y)
    loss = tl.fma(share - 1.0, log_large, _minus(share * log_small))
    variance = tl.maximum(variance, tl.full([], 1e-12, x.dtype))  # a bare 1e-12 would be a float32
    if x.dtype == tl.float64:
        slope = (x - y) / variance
    else:
        r = tl.rsqrt(variance)
        slope = (x - y) * (r * r)
    return loss, slope, x, rest, 1.0


@triton.jit
def _decay(x):
    """part and factor, whose product is log1p(e) for e = exp(-|x|); sigmoid(|x|) and sigmoid(-|x|).

    float32: rsqrt(1 + e)**2 replaces a division.
    float64: log(u) e / (u - 1) with u = fl(1 + e).
    """
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        r = 1.0 / u
        er = e * r
        part = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        factor = 1.0
    else:
        e = tl.exp2(_minus(tl.abs(1.4426950408889634 * x)))
        root = tl.rsqrt(1.0 + e)
        r = root * root
        er = e * r
        part = e * root
        factor = _asinh_factor(e * er)
    return part, factor, r, er


@triton.jit
def _logistic(x):
    """part and factor, whose product is log1p(exp(-|x|)); sigmoid(x), sigmoid(-x), and the slope of the first."""
    part, factor, r, er = _decay(x)
    return part, factor, tl.where(x >= 0.0, r, er), tl.where(x >= 0.0, er, r), er * r


@triton.jit
def _prediction(x, sigmoid):
    """sigmoid(x), but near 0 1/2 + x / 4 (to x**3 / 48), which crosses 1/2 where x crosses 0; rsqrt(2)**2 does not."""
    if x.dtype != tl.float64:
        sigmoid = tl.where(tl.abs(x) < 0.004, tl.fma(x, 0.25, 0.5), sigmoid)
    return sigmoid


@triton.jit
def bce_with_logits(x, y, p, s):
    """l = (1 - y) x + w (max(-x, 0) + log1p(exp -|x|)) with w = 1 + (pos_weight - 1) y; dl/dx = (1 - y) - w (1 - sigmoid)."""
    part, factor, sigmoid, rest, dq = _logistic(x)
    # a NaN that maximum drops comes back through the logarithm
    softplus = tl.fma(part, factor, tl.maximum(_minus(x), 0.0))
    slope = sigmoid - y
    if len(p) == 1:
        w = tl.fma(p[0].to(x.dtype) - 1.0, y, 1.0)
        softplus *= w
        slope = tl.fma(_minus(w), rest, 1.0 - y)
    return tl.fma(1.0 - y, x, softplus), slope, sigmoid, rest, dq


@triton.jit
def _log_and_inverse(v, rest):
    """log v and 1 / v for v above 0, where rest = 1 - v is exact near v = 1; float32: v below 2**-126 gives some numbers."""
    if v.dtype == tl.float64:
        near = tl.abs(rest) < 0.5
        whole = tl.where(near, 1.0 - rest, v)
        log = tl.log(whole) + tl.where(near, (1.0 - whole) - rest, 0.0)
        inverse = 1.0 / tl.where(v > 0.0, v, 1.0)
    else:
        k, m, root, inverse = _split(v)
        ratio = tl.where(k == 0.0, _minus(rest), m - 1.0)
        log = _log_of(k, ratio, root, 1.0)
    return log, inverse


@triton.jit
def _exponent(CONSTANT: tl.constexpr, p, AT: tl.constexpr, like):
    """A constant exponent, or the operand at AT."""
    if CONSTANT == OPERAND:
        exponent = p[AT].to(like.dtype)
    else:
        exponent = CONSTANT
    return exponent


@triton.jit
def _power_of(v, exponent, scale=1.0):
    """scale v**g and scale v**(g - 1) for 0 <= v and a tensor g; at v = 0 that is 0 (scale if g = 0), g times the second 0."""
    g = exponent.to(v.dtype)
    if v.dtype == tl.float64:
        live = v >= tl.full([], 2.2250738585072014e-308, v.dtype)  # 1 / v of a denormal is infinite
        safe = tl.where(live, v, 1.0)
        w, inverse = tl.exp(g * tl.where(live, tl.log(safe), -1.0e300)), 1.0 / safe
    else:
        live = v >= 1.1754943508222875e-38
        k, m, root, inverse = _split(v)
        w = tl.exp2(g * tl.where(live, _log_of(k, m - 1.0, root, 1 / LOG_2), -3.0e38))
    w = tl.fma(v, 0.0, w) * scale  # NaN where v is
    return w, w * inverse


@triton.jit
def _power(v, CONSTANT: tl.constexpr, p, AT: tl.constexpr, scale=1.0):
    """scale v**g and scale v**(g - 1) for 0 <= v; g is 0, 1, 2, 3 or 4, or the operand at AT.

    For g = 0 the second is to meet that factor.
    """
    if CONSTANT == OPERAND:
        w, less = _power_of(v, p[AT], scale)
    elif CONSTANT == 0:
        w, less = tl.fma(v, 0.0, scale), 0.0
    else:
        less = scale
        for _ in tl.static_range(CONSTANT - 1):
            less *= v
        w = less * v
    return w, less


@triton.jit
def _unit(y):
    """y, but NaN outside [0, 1]."""
    return tl.where(_is_probability(y), y, float("nan"))


@triton.jit
def _finite(loss):
    """A loss that may meet a slope of 0."""
    return tl.minimum(loss, 3.0e38)


@triton.jit
def _signed(x, y):
    """x where y is 1, -x where y is 0, else NaN."""
    return tl.where(y == 1.0, x, tl.where(y == 0.0, _minus(x), float("nan")))


@triton.jit
def focal(x, y, p, s):
    """l = a (1 - p_t)**g ce, ce = BCE of the logit; s = (hard, alpha, gamma).

    u = 1 - p_t, dl = a (u**g dce + g u**(g - 1) du ce).
    Targets of 0 and 1: with z = (2 y - 1) x, u = sigmoid(-z) and dl/dz = -a u**g (u + g (1 - u) ce); log u = -softplus(z) takes
    no further logarithm. Others: along |x|, with m = 1 - y for x >= 0 else y: ce = m |x| + log1p(exp -|x|),
    dce = m - sigmoid(-|x|), u = m sigmoid(|x|) + (1 - m) sigmoid(-|x|), du = (2 m - 1) dq.
    """
    HARD: tl.constexpr = s[0]
    if HARD:
        positive = y == 1.0
        z = _signed(x, y)
        part, factor, pt, u, dq = _logistic(z)
        ce = tl.fma(part, factor, tl.maximum(_minus(z), 0.0))
        g = _exponent(s[2], p, len(p) - 1, x)
        if s[2] == OPERAND:
            softplus = tl.fma(part, factor, tl.maximum(z, 0.0))
            if x.dtype == tl.float64:
                w = tl.exp(g * _minus(softplus))
            else:
                w = tl.exp2(-1.4426950408889634 * g * softplus)
            w = tl.where(u == 0.0, tl.where(g == 0.0, 1.0, 0.0), w)
        else:
            w, _ = _power(u, s[2], p, 0)
        if s[1] == OPERAND:
            w *= tl.where(positive, p[0].to(x.dtype), 1.0 - p[0].to(x.dtype))
        slope = w * tl.fma(pt * _finite(ce), g, u)
        loss = w * ce
        slope = tl.where(positive, _minus(slope), slope)
        sigmoid, rest = tl.where(positive, pt, u), tl.where(positive, u, pt)
    else:
        y = _unit(y)
        part, factor, r, er = _decay(x)
        wrong = tl.where(x >= 0.0, 1.0 - y, y)  # the share of the target that the sign of x misses
        ce = tl.fma(part, factor, tl.maximum(tl.abs(wrong * x), 0.0))  # 0 inf, a NaN, is dropped
        u = tl.fma(wrong, r - er, er)
        g = _exponent(s[2], p, len(p) - 1, x)
        balance = 1.0
        if s[1] == OPERAND:
            balance = tl.fma(2.0 * p[0].to(x.dtype) - 1.0, y, 1.0 - p[0].to(x.dtype))
        w, less = _power(u, s[2], p, len(p) - 1, balance)
        dq = er * r
        loss = w * ce
        slope = tl.fma(w, wrong - er, less * (tl.fma(wrong, 2.0 * g, -1.0 * g) * dq * _finite(ce)))
        slope = tl.where(x >= 0.0, slope, _minus(slope))
        sigmoid, rest = tl.where(x >= 0.0, r, er), tl.where(x >= 0.0, er, r)
    return loss, slope, sigmoid, rest, dq


@triton.jit
def asymmetric(x, y, p, s):
    """l = -(1 - p_t)**g (y log max(p, eps) + (1 - y) log max(q, eps)), q = min(1 - p + clip, 1), p_t = p y + q (1 - y),
    g = gamma_pos y + gamma_neg (1 - y); s = (hard, gamma_neg, gamma_pos, detach_focal).

    miss = 1 - q is max(p - clip, 0). For targets of 0 and 1 one logarithm serves: that of v, p or q, and 1 - p_t is 1 - v.
    """
    HARD: tl.constexpr = s[0]
    clip, eps = p[len(p) - 2].to(x.dtype), p[len(p) - 1].to(x.dtype)
    if HARD:
        positive = y == 1.0
        x = tl.where(positive | (y == 0.0), x, float("nan"))
    else:
        y = _unit(y)
        log_eps, _ = _log_and_inverse(eps, 1.0 - eps)  # first: where it is used, an eps for each channel made a spill
        floor = tl.where(eps > 0.0, log_eps, float("-inf"))
    part, factor, sigmoid, sigmoid_neg, dq = _logistic(x)
    over = _prediction(x, sigmoid) - clip
    # A NaN input or target reaches the loss by miss alone: other maxima drop it.
    miss = tl.maximum(over, 0.0, propagate_nan=tl.PropagateNan.ALL)
    hit = tl.minimum(sigmoid_neg + clip, 1.0)
    dmiss = tl.where(over >= 0.0, dq, 0.0)  # a clamp passes at equality
    if HARD:
        v, u = tl.where(positive, sigmoid, hit), tl.where(positive, sigmoid_neg, miss)
        bounded = tl.maximum(v, eps)
        log, inverse = _log_and_inverse(bounded, tl.minimum(u, 1.0 - eps))
        log = tl.where(bounded == 0.0, float("-inf"), log)
        du = tl.where(positive, _minus(dq), dmiss)
        dlog = tl.where(v >= eps, tl.where(positive, sigmoid_neg, _minus(dmiss) * inverse), 0.0)
        if s[1] == OPERAND or s[2] == OPERAND:
            first = tl.zeros_like(x) + _exponent(s[1], p, 0, x)
            second = tl.zeros_like(x) + _exponent(s[2], p, len(p) - 3, x)
            g = tl.where(positive, second, first)
            w, less = _power_of(u, g)
            dw = g * less
        else:
            w_neg, less_neg = _power(u, s[1], p, 0)
            w_pos, less_pos = _power(u, s[2], p, 0)
            w, dw = tl.where(positive, w_pos, w_neg), tl.where(positive, s[2] * less_pos, s[1] * less_neg)
    else:
        other = 1.0 - y
        seen = sigmoid >= eps
        log_p = tl.where(seen, tl.fma(_minus(part), factor, tl.minimum(x, 0.0)), floor)
        known = (hit >= eps) & (hit > 0.0)
        log_hit, inverse = _log_and_inverse(hit, miss)
        log_q = tl.where(known, log_hit, floor)
        most = tl.maximum(floor, 0.0)  # where a share of 0 meets an infinity
        log = tl.minimum(y * log_p, most) + tl.minimum(other * log_q, most)
        missed, gained = other * dmiss, y * sigmoid_neg
        dlog = tl.fma(_minus(missed), tl.where(known, inverse, 0.0), tl.where(seen, gained, 0.0))
        u, du = tl.fma(other, miss, gained), tl.fma(_minus(y), dq, missed)
        if s[1] != OPERAND and s[1] == s[2]:
            g = s[1]
            w, less = _power(u, s[1], p, 0)
        else:
            g = tl.fma(y, _exponent(s[2], p, len(p) - 3, x), _exponent(s[1], p, 0, x) * other)
            w, less = _power_of(u, g)
        dw = g * less
    slope = w * dlog
    if not s[3]:
        slope = tl.fma(dw * du, tl.maximum(log, -3.0e38), slope)
    return w * _minus(log), _minus(slope), sigmoid, sigmoid_neg, dq


@triton.jit
def epsilon_insensitive(x, y, p, s):
    """l = max(|d| - epsilon, 0) for d = x - y; dl/dx = sign d where |d| > epsilon else 0."""
    d, epsilon = x - y, p[0].to(x.dtype)
    size = tl.abs(d)
    inside = size <= epsilon
    slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    return tl.where(inside, 0.0, size - epsilon), tl.where(inside, 0.0, slope), x, 1.0 - x, 1.0


@triton.jit
def quantile(x, y, p, s):
    """l = q (y - x) where x < y else (q - 1) (y - x); dl/dx = -q below y, 1 - q above, 0 at y."""
    d, q = x - y, p[0].to(x.dtype)
    slope = tl.where(d < 0.0, -q, tl.where(d > 0.0, 1.0 - q, d))
    return slope * d, slope, x, 1.0 - x, 1.0


@triton.jit
def hinge(x, y, p, s):
    """l = max(margin - t x, 0) for t = 2 y - 1; dl/dx = -t where t x <= margin else 0."""
    t, margin = tl.fma(y, 2.0, -1.0), p[0].to(x.dtype)
    reached = t * x
    beyond = reached > margin
    return tl.where(beyond, 0.0, margin - reached), tl.where(beyond, 0.0, _minus(t)), x, 1.0 - x, 1.0


# ---------------------------------------------------------------------------------------------------------------- rules


@triton.jit
def unweighted(loss, slope, x, y, q, rest, dq, p, s):
    """w = 1."""
    return loss, slope


@triton.jit
def by_prediction(loss, slope, x, y, q, rest, dq, p, s):
    """w = above where x >= t else below."""
    w = tl.where(x >= p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype))
    return loss * w, slope * w


@triton.jit
def by_outcome(loss, slope, x, y, q, rest, dq, p, s):
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
def _pulling(loss, dq, s):
    """loss * dq, which the slope of a weight is multiplied by. Where the slope of an infinite logit is 0, so is this."""
    if s[0] == "logits":
        loss = _finite(loss)
    return loss * dq


@triton.jit
def by_confidence(loss, slope, x, y, q, rest, dq, p, s):
    """w = 1 where p_t < t else ((1 - p_t) / t)**g, p_t = q y + (1 - q) (1 - y); s = (kind, gamma)."""
    t = p[0].to(x.dtype)
    inverse = 1.0 / t
    pt, u = tl.fma(q, y, rest * (1.0 - y)), tl.fma(rest, y, q * (1.0 - y))
    w, less = _power(u * inverse, s[1], p, len(p) - 1)
    steep = _exponent(s[1], p, len(p) - 1, x) * inverse
    pull = less * tl.fma(y, -2.0 * steep, steep) * _pulling(loss, dq, s)
    if s[0] == "logits":
        # At an input of 0 pt = u, which are not quite 1/2, as 1 / t is not quite 2.
        sure = pt * tl.where(t == 0.5, 1.0, (1.0 - t) * inverse) >= u
    else:
        sure = pt >= t
    return tl.where(sure, loss * w, loss), tl.where(sure, tl.fma(slope, w, pull), slope)


@triton.jit
def by_proximity(loss, slope, x, y, q, rest, dq, p, s):
    """w = 1 + factor (1 - d / range) where d = |q - t| < range, else 1; dw/dq = -(factor / range) sign(q - t), sign(0) = 0."""
    t, reach, factor = p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype)
    if s[0] == "logits":
        q = _prediction(x, q)
    u = q - t
    d, inverse = tl.abs(u), 1.0 / reach
    w = tl.fma(factor, tl.maximum(tl.fma(_minus(d), inverse, 1.0), 0.0), 1.0)
    steep = tl.where(u > 0.0, -factor * inverse, factor * inverse)
    pull = tl.where((d < reach) & (u != 0.0), steep * _pulling(loss, dq, s), 0.0)
    return loss * w, tl.fma(slope, w, pull)


@triton.jit
def by_loss(loss, slope, x, y, q, rest, dq, p, s):
    """w = factor where l > bound else below."""
    w = tl.where(loss > p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype))
    return loss * w, slope * w
