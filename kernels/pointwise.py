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
        # A division takes ten instructions more. A GPU's rsqrt takes denormals for 0, so they are scaled; of the forms that do
        # so, this one does not spill.
        root = tl.rsqrt(safe)
        root = tl.where(safe < 1.1754943508222875e-38, 4096.0 * tl.rsqrt(16777216.0 * safe), root)
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
    return d * d, 2.0 * d, x, 1.0 - x, 1.0


@triton.jit
def huber(x, y, p, s):
    """l = d**2 / 2 where |d| <= delta else delta (|d| - delta / 2) for d = x - y; dl/dx = d held to -delta and delta."""
    d, delta = x - y, p[0].to(x.dtype)
    size = tl.abs(d)
    near = size <= delta
    slope = tl.where(near, d, tl.where(d > 0.0, delta, tl.where(d < 0.0, -delta, d)))
    return tl.where(near, 0.5 * d * d, delta * (size - 0.5 * delta)), slope, x, 1.0 - x, 1.0


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
    return loss, slope, x, 1.0 - x, 1.0


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
def _logistic(x):
    """e = exp(-|x|), log1p(e), sigmoid(x), sigmoid(-x), and the slope of the first. rsqrt(1 + e)**2 replaces a division."""
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
    else:
        e = tl.exp2(-1.4426950408889634 * tl.abs(x))
        r = tl.rsqrt(1.0 + e)
        r = r * r
    er = e * r
    return _softplus_neg_abs(e), tl.where(x >= 0.0, r, er), tl.where(x >= 0.0, er, r), er * r


@triton.jit
def _predictions(x, s, rest):
    """sigmoid(x) and sigmoid(-x), but near 0 1/2 + x / 4 (to x**3 / 48), which crosses 1/2 where x crosses 0; rsqrt(2)**2 does
    not."""
    if x.dtype != tl.float64:
        near = tl.abs(x) < 0.004
        s = tl.where(near, 0.5 + 0.25 * x, s)
        rest = tl.where(near, 0.5 - 0.25 * x, rest)
    return s, rest


@triton.jit
def bce_with_logits(x, y, p, s):
    """l = (1 - y) x + w (max(-x, 0) + log1p(exp -|x|)) with w = 1 + (pos_weight - 1) y; dl/dx = (1 - y) - w (1 - sigmoid)."""
    log1p, sigmoid, rest, dq = _logistic(x)
    softplus = tl.maximum(-x, 0.0) + log1p  # a NaN that maximum drops comes back through the logarithm
    slope = sigmoid - y
    if len(p) == 1:
        w = 1.0 + (p[0].to(x.dtype) - 1.0) * y
        softplus *= w
        slope = (1.0 - y) - w * rest
    q, rest = _predictions(x, sigmoid, rest)
    return (1.0 - y) * x + softplus, slope, q, rest, dq


@triton.jit
def _is_probability(y):
    return y - y * y >= 0.0


@triton.jit
def _log(v, rest):
    """log v for v above 0, where rest = 1 - v is exact near v = 1; float32: v = 2**k m as in _logs, v below 2**-126 gives some
    number."""
    if v.dtype == tl.float64:
        near = tl.abs(rest) < 0.5
        whole = tl.where(near, 1.0 - rest, v)
        log = tl.log(whole) + tl.where(near, (1.0 - whole) - rest, 0.0)
    else:
        bits = v.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
        f = tl.where(k == 0, -rest, f)
        log = 0.6931471805599453 * k.to(tl.float32) + _log_polynomial(f)
    return log


@triton.jit
def _inverse(v):
    """1 / v for v above 0, without a division; a v below 2**-126 counts as that."""
    if v.dtype == tl.float64:
        inverse = 1.0 / tl.where(v > 0.0, v, 1.0)
    else:
        r = tl.rsqrt(tl.maximum(v, 1.1754943508222875e-38))
        inverse = r * r
    return inverse


@triton.jit
def _exponent(CONSTANT: tl.constexpr, p, AT: tl.constexpr):
    """A constant exponent, or the operand at AT."""
    if CONSTANT == OPERAND:
        exponent = p[AT]
    else:
        exponent = CONSTANT
    return exponent


@triton.jit
def _power_of(v, rest, exponent):
    """v**g and its derivative in v, for 0 <= v, rest = 1 - v and a tensor g; at v = 0 they are 0 (1 for g = 0) and 0."""
    g = exponent.to(v.dtype)
    if v.dtype == tl.float64:
        live = v > 0.0
        w = tl.exp(g * _log(tl.where(live, v, 1.0), tl.where(live, rest, 0.0)))
    else:
        live = v >= 1.1754943508222875e-38
        w = tl.exp2(1.4426950408889634 * g * _log(v, rest))
    w = tl.where(live, w, tl.where(g == 0.0, 1.0, 0.0))
    return w, tl.where(live, g * w * _inverse(v), 0.0)


@triton.jit
def _power(v, rest, CONSTANT: tl.constexpr, p, AT: tl.constexpr):
    """v**g and its derivative in v, for 0 <= v and rest = 1 - v; g is 0, 1, 2, 3 or 4, or the operand at AT."""
    if CONSTANT == OPERAND:
        w, dw = _power_of(v, rest, p[AT])
    elif CONSTANT == 0:
        w, dw = 0.0 * v + 1.0, 0.0 * v
    elif CONSTANT == 1:
        w, dw = v, 0.0 * v + 1.0
    elif CONSTANT == 2:
        w, dw = v * v, 2.0 * v
    elif CONSTANT == 3:
        w, dw = v * v * v, 3.0 * v * v
    else:
        square = v * v
        w, dw = square * square, 4.0 * v * square
    return w, dw


@triton.jit
def _unit(y):
    """y, but NaN outside [0, 1]."""
    return tl.where(_is_probability(y), y, float("nan"))


@triton.jit
def _finite(loss):
    """A loss that may meet a slope of 0."""
    return tl.minimum(loss, 3.0e38)


@triton.jit
def focal(x, y, p, s):
    """l = a (1 - p_t)**g ce, ce = BCE of the logit; s = (hard, alpha, gamma).

    With u = 1 - p_t: dl/dx = a (u**g ce' + (u**g)' u' ce). For targets of 0 and 1 and z = (2 y - 1) x, u = sigmoid(-z) and
    dl/dz = -a u**g (u + g (1 - u) ce), and log u = -softplus(z) takes no further logarithm.
    """
    HARD: tl.constexpr = s[0]
    y = _unit(y)
    if HARD:
        positive = y > 0.5
        z = tl.where(positive, x, x * (2.0 * y - 1.0))  # NaN where y is
        log1p, pt, u, dq = _logistic(z)
        ce = tl.maximum(-z, 0.0) + log1p
        easy = pt * _finite(ce)
        if s[2] == OPERAND:
            g = p[len(p) - 1].to(x.dtype)
            softplus = tl.maximum(z, 0.0) + log1p
            if x.dtype == tl.float64:
                w = tl.exp(-g * softplus)
            else:
                w = tl.exp2(-1.4426950408889634 * g * softplus)
            w = tl.where(u == 0.0, tl.where(g == 0.0, 1.0, 0.0), w)
            slope = w * (u + g * easy)
        else:
            w, _ = _power(u, pt, s[2], p, 0)
            slope = w * (u + s[2] * easy)
        loss = w * ce
        slope = tl.where(positive, -slope, slope)
        sigmoid, rest = tl.where(positive, pt, u), tl.where(positive, u, pt)
        if s[1] == OPERAND:
            balance = tl.where(positive, p[0].to(x.dtype), 1.0 - p[0].to(x.dtype))
    else:
        log1p, sigmoid, rest, dq = _logistic(x)
        other = 1.0 - y
        u, pt = y * rest + other * sigmoid, y * sigmoid + other * rest
        linear = tl.where(x >= 0.0, other, y)
        ce = tl.where(linear == 0.0, 0.0, linear * tl.abs(x)) + log1p
        w, dw = _power(u, pt, s[2], p, len(p) - 1)
        loss = w * ce
        slope = w * (other * sigmoid - y * rest) + dw * ((1.0 - 2.0 * y) * dq) * _finite(ce)
        if s[1] == OPERAND:
            balance = 1.0 - p[0].to(x.dtype) + (2.0 * p[0].to(x.dtype) - 1.0) * y
    if s[1] == OPERAND:
        loss *= balance
        slope *= balance
    q, rest = _predictions(x, sigmoid, rest)
    return loss, slope, q, rest, dq


@triton.jit
def asymmetric(x, y, p, s):
    """l = -(1 - p_t)**g (y log max(p, eps) + (1 - y) log max(q, eps)), q = min(1 - p + clip, 1), p_t = p y + q (1 - y),
    g = gamma_pos y + gamma_neg (1 - y); s = (hard, gamma_neg, gamma_pos, detach_focal).

    miss = 1 - q is max(p - clip, 0). For targets of 0 and 1 one logarithm serves: that of v, p or q, and 1 - p_t is 1 - v.
    """
    HARD: tl.constexpr = s[0]
    y = tl.where(x == x, _unit(y), float("nan"))
    log1p, sigmoid, sigmoid_neg, dq = _logistic(x)
    clip, eps = p[len(p) - 2].to(x.dtype), p[len(p) - 1].to(x.dtype)
    over = sigmoid - clip
    miss, hit = tl.maximum(over, 0.0), tl.minimum(sigmoid_neg + clip, 1.0)
    dmiss = tl.where(over >= 0.0, dq, 0.0)  # a clamp passes at equality
    if HARD:
        positive = y > 0.5
        v, u = tl.where(positive, sigmoid, hit), tl.where(positive, sigmoid_neg, miss)
        bounded = tl.maximum(v, eps)
        log = tl.where(bounded == 0.0, float("-inf"), _log(bounded, tl.minimum(u, 1.0 - eps)))
        du = tl.where(positive, -dq, dmiss)
        dlog = tl.where(v >= eps, tl.where(positive, sigmoid_neg, -dmiss * _inverse(bounded)), 0.0)
        if s[1] == OPERAND or s[2] == OPERAND:
            first = tl.zeros_like(x) + _exponent(s[1], p, 0)
            second = tl.zeros_like(x) + _exponent(s[2], p, len(p) - 3)
            w, dw = _power_of(u, v, tl.where(positive, second, first))
        else:
            w_neg, dw_neg = _power(u, v, s[1], p, 0)
            w_pos, dw_pos = _power(u, v, s[2], p, 0)
            w, dw = tl.where(positive, w_pos, w_neg), tl.where(positive, dw_pos, dw_neg)
        w += 0.0 * y  # NaN where y is
    else:
        other = 1.0 - y
        floor = tl.where(eps > 0.0, tl.log(tl.where(eps > 0.0, eps, 1.0)), float("-inf"))
        log_p = tl.where(sigmoid >= eps, -(tl.maximum(-x, 0.0) + log1p), floor)
        log_q = tl.where((hit >= eps) & (hit > 0.0), _log(hit, miss), floor)
        log = tl.where(y == 0.0, 0.0, y * log_p) + tl.where(other == 0.0, 0.0, other * log_q)
        dlog = tl.where(sigmoid >= eps, y * sigmoid_neg, 0.0)
        dlog -= tl.where(hit >= eps, other * dmiss * _inverse(hit), 0.0)
        u, v = y * sigmoid_neg + other * miss, y * sigmoid + other * hit
        du = other * dmiss - y * dq
        if s[1] != OPERAND and s[1] == s[2]:
            w, dw = _power(u, v, s[1], p, 0)
        else:
            w, dw = _power_of(u, v, _exponent(s[2], p, len(p) - 3) * y + _exponent(s[1], p, 0) * other)
    slope = w * dlog
    if not s[3]:
        slope += dw * du * tl.maximum(log, -3.0e38)
    q, rest = _predictions(x, sigmoid, sigmoid_neg)
    return w * -log, -slope, q, rest, dq


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
    t, margin = 2.0 * y - 1.0, p[0].to(x.dtype)
    reached = t * x
    beyond = reached > margin
    return tl.where(beyond, 0.0, margin - reached), tl.where(beyond, 0.0, -t), x, 1.0 - x, 1.0


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
def _carried(loss, slope, w, dw):
    """w * l and its derivative. An infinite loss does not meet a dw of 0."""
    return loss * w, slope * w + tl.where(dw == 0.0, 0.0, loss * dw)


@triton.jit
def by_confidence(loss, slope, x, y, q, rest, dq, p, s):
    """w = 1 where p_t < t else ((1 - p_t) / t)**g, p_t = q y + (1 - q) (1 - y); s = (kind, gamma)."""
    inverse = 1.0 / p[0].to(x.dtype)
    pt, u = q * y + rest * (1.0 - y), rest * y + q * (1.0 - y)
    v = u * inverse
    w, dw = _power(v, 1.0 - v, s[1], p, len(p) - 1)
    sure = pt >= p[0].to(x.dtype)
    carried, steep = _carried(loss, slope, w, dw * (1.0 - 2.0 * y) * dq * inverse)
    return tl.where(sure, carried, loss), tl.where(sure, steep, slope)


@triton.jit
def by_proximity(loss, slope, x, y, q, rest, dq, p, s):
    """w = 1 + factor (1 - d / range) where d = |q - t| < range, else 1; dw/dq = -(factor / range) sign(q - t), sign(0) = 0."""
    t, reach, factor = p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype)
    u = q - t
    d = tl.abs(u)
    near = d < reach
    inverse = 1.0 / reach
    w = tl.where(near, 1.0 + factor * (1.0 - d * inverse), 1.0)
    steep = factor * inverse * dq
    dw = tl.where(u > 0.0, -steep, tl.where(u < 0.0, steep, 0.0))
    weighed, pulled = _carried(loss, slope, w, dw)
    return weighed, tl.where(near, pulled, slope)


@triton.jit
def by_loss(loss, slope, x, y, q, rest, dq, p, s):
    """w = factor where l > bound else below."""
    w = tl.where(loss > p[0].to(x.dtype), p[1].to(x.dtype), p[2].to(x.dtype))
    return loss * w, slope * w
