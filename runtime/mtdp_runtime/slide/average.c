/* The area averages of resample.py: the same integers as its NumPy products, value by value, several times as fast.

   Two taps at a time, as 16-bit numbers (pmaddwd where there is AVX2). Built by hatch_build.py with -ffp-contract=off: a
   product and a sum that were fused would round once instead of twice. Nothing here allocates or keeps anything. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

/* Named in the library, so that none is used that was built from another text than the one beside it. */
const char mtdp_average_source[] = SOURCE_DIGEST;

/* Rounds halves to even, below 2^22, as cvtps does, and rint in NumPy. */
static int32_t nearest(float value) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: one is the last bit that it has */
    return (int32_t)((value + shift) - shift);
}

/* One line: the sums over rows of `count` bytes, brought to 15 bits. */
static void down_plain(const uint8_t *top, long stride, const int16_t *weights, long taps, float factor, int16_t *line,
                       long count) {
    enum { AT_ONCE = 64 };
    for (long from = 0; from < count; from += AT_ONCE) {
        const long many = count - from < AT_ONCE ? count - from : AT_ONCE;
        int32_t sums[AT_ONCE] = {0};
        for (long tap = 0; tap < taps; tap++) {
            const uint8_t *row = top + tap * stride + from;
            const int32_t weight = weights[tap];
            for (long at = 0; at < many; at++) sums[at] += weight * row[at];
        }
        for (long at = 0; at < many; at++) line[from + at] = (int16_t)nearest((float)sums[at] * factor);
    }
}

/* One line of the tile: the sums over columns, brought to bytes. `weights` and `factors` are repeated four times. */
static void across_plain(const int16_t *line, const int32_t *first, const int16_t *weights, long pairs,
                         const float *factors, uint8_t *out, long from, long width) {
    for (long x = from; x < width; x++) {
        const int16_t *at = line + 3L * first[x];
        int32_t sums[3] = {0};
        for (long pair = 0; pair < pairs; pair++, at += 6) {
            const int32_t one = weights[(pair * width + x) * 8], other = weights[(pair * width + x) * 8 + 1];
            for (long channel = 0; channel < 3; channel++) sums[channel] += one * at[channel] + other * at[channel + 3];
        }
        for (long channel = 0; channel < 3; channel++)
            out[3 * x + channel] = (uint8_t)nearest((float)sums[channel] * factors[4 * x]);
    }
}

#ifdef AVX2
AVX2 static __m256i scaled(__m256i sums, __m256 factor) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), factor));
}

AVX2 static void down_avx2(const uint8_t *top, long stride, const int16_t *weights, long taps, float factor,
                           int16_t *line, long count) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256 times = _mm256_set1_ps(factor);
    for (long at = 0; at < count; at += 32) {
        if (at > count - 32) at = count - 32; /* the last ones once more: the same values */
        __m256i sum0 = zero, sum1 = zero, sum2 = zero, sum3 = zero;
        for (long tap = 0; tap < taps; tap += 2) {
            int32_t two;
            memcpy(&two, weights + tap, 4);
            const __m256i weight = _mm256_set1_epi32(two);
            const __m256i a = _mm256_loadu_si256((const __m256i *)(top + tap * stride + at));
            const __m256i b = _mm256_loadu_si256((const __m256i *)(top + (tap + 1) * stride + at));
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
            sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
            sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
            sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
        }
        const __m256i left = _mm256_packs_epi32(scaled(sum0, times), scaled(sum1, times));
        const __m256i right = _mm256_packs_epi32(scaled(sum2, times), scaled(sum3, times));
        _mm256_storeu_si256((__m256i *)(line + at), _mm256_permute2x128_si256(left, right, 0x20));
        _mm256_storeu_si256((__m256i *)(line + at + 16), _mm256_permute2x128_si256(left, right, 0x31));
    }
}

/* The same where 2, 4, .. 128 rows weigh alike: their sum, shifted to 15 bits, is the number that down_avx2 rounds to. */
AVX2 static void down_alike_avx2(const uint8_t *top, long stride, long taps, int shift, int16_t *line, long count) {
    for (long at = 0; at < count; at += 16) {
        if (at > count - 16) at = count - 16;
        __m256i sum = _mm256_setzero_si256();
        for (long tap = 0; tap < taps; tap++) {
            const __m128i row = _mm_loadu_si128((const __m128i *)(top + tap * stride + at));
            sum = _mm256_add_epi16(sum, _mm256_cvtepu8_epi16(row));
        }
        _mm256_storeu_si256((__m256i *)(line + at), _mm256_sll_epi16(sum, _mm_cvtsi32_si128(shift)));
    }
}

/* Two outputs at a time; writes one byte beyond the last pixel, and reads four numbers beyond the last of the line. */
AVX2 static long across_avx2(const int16_t *line, const int32_t *first, const int16_t *weights, long pairs,
                             const float *factors, uint8_t *out, long width) {
    /* R0 G0 B0 R1 G1 B1 .. -> R0 R1 G0 G1 B0 B1 0 0 */
    const __m256i by_channel = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1));
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    long x = 0;
    for (; x + 2 <= width; x += 2) {
        const int16_t *a = line + 3L * first[x], *b = line + 3L * first[x + 1];
        __m256i sums = _mm256_setzero_si256();
        for (long pair = 0; pair < pairs; pair++) {
            const __m128i low = _mm_loadu_si128((const __m128i *)(a + 6 * pair));
            const __m128i high = _mm_loadu_si128((const __m128i *)(b + 6 * pair));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            const __m256i weight = _mm256_loadu_si256((const __m256i *)(weights + (pair * width + x) * 8));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(both, by_channel), weight));
        }
        const __m256i found = _mm256_shuffle_epi8(scaled(sums, _mm256_loadu_ps(factors + 4 * x)), bytes);
        const int32_t left = _mm256_extract_epi32(found, 0), right = _mm256_extract_epi32(found, 4);
        memcpy(out + 3 * x, &left, 4);
        memcpy(out + 3 * x + 3, &right, 4);
    }
    return x;
}
#endif

/* For taps that weigh alike and are 2, 4, .. 128: the 7 - n for 2^n of them; -1 for all others. */
static int shift_of(const int16_t *weights, long taps) {
    int shift = 7;
    for (long tap = 1; tap < taps; tap++)
        if (weights[tap] != weights[0]) return -1;
    for (long left = taps; left > 1; left /= 2, shift--)
        if (left % 2) return -1;
    return shift;
}

/* What this machine's processor is used with: 1 for AVX2, 0 for what every one has. */
int mtdp_average_level(void) {
#ifdef AVX2
    return __builtin_cpu_supports("avx2") ? 1 : 0;
#else
    return 0;
#endif
}

/* Averages source, rows of `width` pixels, into out. `line` has room for 3 * width + 8 numbers of 16 bits, and behind
   them 3 * out_width + 8 bytes. Taps are even in number, and all lie inside of the source. */
void mtdp_average(int level, const uint8_t *source, long stride, long width, uint8_t *out, long out_stride,
                  long out_height, long out_width, const int32_t *first_y, const int16_t *weights_y,
                  const float *factors_y, long taps_y, const int32_t *first_x, const int16_t *weights_x,
                  const float *factors_x, long taps_x, int16_t *line) {
    const long count = 3 * width;
    uint8_t *tile_line = (uint8_t *)(line + count + 8);
    for (long y = 0; y < out_height; y++) {
        const uint8_t *top = source + first_y[y] * stride;
        const int16_t *weights = weights_y + y * taps_y;
        long taps = taps_y, x = 0;
        while (taps > 2 && !weights[taps - 1] && !weights[taps - 2]) taps -= 2;
#ifdef AVX2
        const int shift = level > 0 ? shift_of(weights, taps) : -1;
        if (shift >= 0 && count >= 16)
            down_alike_avx2(top, stride, taps, shift, line, count);
        else if (level > 0 && count >= 32)
            down_avx2(top, stride, weights, taps, factors_y[y], line, count);
        else
#endif
            down_plain(top, stride, weights, taps, factors_y[y], line, count);
#ifdef AVX2
        if (level > 0) x = across_avx2(line, first_x, weights_x, taps_x / 2, factors_x, tile_line, out_width);
#endif
        across_plain(line, first_x, weights_x, taps_x / 2, factors_x, tile_line, x, out_width);
        memcpy(out + y * out_stride, tile_line, (size_t)(3 * out_width));
    }
}
