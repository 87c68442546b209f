/* The arithmetic of kernels/assembly.py on the CPU, beside its own division and square root, which round right.
 *
 * `off`: by how many ulps the approximations, MUFU.RSQ and MUFU.RCP, differ from what rounds right.
 * Compile without contraction (-ffp-contract=off): only `fmaf` is fused.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static float number(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* Approximations flush subnormal operands and results to zero (.ftz); 0, infinity and NaN are exact. */
static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

static float moved(float x, int off) {
    return x == 0 || !isfinite(x) ? x : flushed(number(bits_of(x) + (uint32_t)off));
}

static float approximate_root(float x, int off) { return moved((float)(1.0 / sqrt((double)flushed(x))), off); }

static float approximate_inverse(float x, int off) {
    return moved(flushed((float)(1.0 / (double)flushed(x))), off);
}

static float root(float x, int off) {
    float a = approximate_root(x, off);
    float q = x * a, h = a * 0.5f;
    return fmaf(fmaf(-q, q, x), h, q);
}

static float quotient(float x, float y, int off) {
    float a = approximate_inverse(y, off);
    a = fmaf(a, fmaf(-y, a, 1.0f), a);
    float q = fmaf(x, a, 0.0f);
    return fmaf(a, fmaf(-y, q, x), q);
}

static int is_good_root(float x) { return bits_of(x) - 0x0D000000u < 0x7F800000u - 0x0D000000u; }

/* False also beside NaN, as min.NaN and setp have it. */
static int is_good_quotient(float y, float q) { return y >= 0x1p-50f && fabsf(q) >= 0x1p-50f; }

static int is_good_by_root(float square, float epsilon, float q) {
    return is_good_root(square) && fabsf(q) * fminf(epsilon, 1.0f) >= 0x1p-100f;
}

static int differ(float x, float y) { return bits_of(x) != bits_of(y) && !(isnan(x) && isnan(y)); }

/* Roots of the numbers with bits from `first` up to `end` that would be wrong; the bits of some are put into `found`. */
int64_t wrong_roots(uint32_t first, uint32_t end, int off, uint32_t *found, int64_t room) {
    int64_t wrong = 0;
    for (uint32_t bits = first; bits != end; bits++) {
        float x = number(bits);
        if (is_good_root(x) && differ(root(x, off), sqrtf(x))) {
            if (wrong < room) found[wrong] = bits;
            wrong++;
        }
    }
    return wrong;
}

/* Dividends of [1, 2) whose quotient by y would be wrong. */
int64_t wrong_dividends(uint32_t y, int off, uint32_t *found, int64_t room) {
    int64_t wrong = 0;
    for (uint32_t bits = 0x3F800000; bits != 0x40000000; bits++)
        if (differ(quotient(number(bits), number(y), off), number(bits) / number(y))) {
            if (wrong < room) found[wrong] = bits;
            wrong++;
        }
    return wrong;
}

/* The exception of Markstein's theorem: one Newton step need not round the inverse of 1.11...1 right. */
static int is_all_ones(float y) { return (bits_of(y) & 0x7FFFFF) == 0x7FFFFF; }

/* Quotients of all pairs out of `n` numbers by their bits that are taken and wrong, of x / y and of x / (sqrt(y) + z),
 * for z among the numbers too. Divisors of 1.11...1 are left out where the approximation errs. */
int64_t wrong_among(const uint32_t *numbers, int64_t n, int off, int64_t *taken) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            float x = number(numbers[i]), y = number(numbers[j]);
            float q = quotient(x, y, off);
            if (is_good_quotient(y, q) && !(off && is_all_ones(y))) (*taken)++, wrong += differ(q, x / y);
            for (int64_t k = 0; k < n; k++) {
                float epsilon = number(numbers[k]), divisor = sqrtf(y) + epsilon;
                q = quotient(x, divisor, off);
                if (is_good_by_root(y, epsilon, q) && !(off && is_all_ones(divisor)))
                    (*taken)++, wrong += differ(q, x / divisor);
            }
        }
    return wrong;
}

static uint64_t next(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Quotients that are taken and wrong, of `n` pairs of four kinds: any bits; any mantissas with exponents that are taken;
 * dividends beside a divisor times what is half way between two numbers; divisors with few zeros or ones, likewise.
 * Divisors of 1.11...1 are left out where the approximation errs. */
int64_t wrong_quotients(int64_t n, uint64_t seed, int off, int64_t *taken) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t r = next(&seed), s = next(&seed);
        float x = number((uint32_t)r), y = number((uint32_t)(r >> 32) & 0x7FFFFFFF);
        if (i % 4) {
            y = ldexpf(1.0f + (float)(r & 0x7FFFFF) * 0x1p-23f, (int)(s % 176) - 50);
            x = ldexpf(1.0f + (float)(r >> 23 & 0x7FFFFF) * 0x1p-23f, (int)(s >> 8 & 255) - 126);
        }
        if (i % 4 == 3) {
            uint32_t few = (uint32_t)(s >> 16 & 0x7FFFFF) & (uint32_t)(s >> 40);
            y = ldexpf(1.0f + (float)(s & 1 << 9 ? few : few ^ 0x7FFFFF) * 0x1p-23f, (int)(s % 176) - 50);
        }
        if (i % 4 >= 2) {
            double middle = 1.0 + ((double)(r >> 46 & 0x7FFFFF) + 0.5) * 0x1p-23;
            double product = (double)y * middle * ldexp(1.0, (int)(s >> 8 & 63) - 32);
            x = product < 0x1p127 ? number(bits_of((float)product) + (uint32_t)(s >> 14 & 3) - 1) : y;
        }
        if (r >> 63) x = -x;
        float q = quotient(x, y, off);
        if (is_good_quotient(y, q) && !(off && is_all_ones(y))) (*taken)++, wrong += differ(q, x / y);
    }
    return wrong;
}
