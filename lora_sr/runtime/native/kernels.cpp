// The layers of SPAN and LKDN on a CPU, several of them fused, without a copy between them.
//
// Features ("maps") are stored as rows of planes, (height, planes, width): the lanes of a vector are neighboring pixels,
// so that no channel is wasted on padding whatever the width of the network, and a row of all planes is contiguous. A
// plane is one channel in float32, or two channels side by side in bfloat16, one 32-bit word a pixel either way. Left
// and right of each row are zeros, which nothing writes to: convolutions need no special case at the edges of the image.
//
// The operations of a group run as a pipeline over strips of rows: each follows the one whose results it reads at the
// distance that its reach asks for, so that these are still in a cache, and a map keeps no more rows than that (its
// rows go round). Threads take the strips of all operations of one step; between steps they meet.
//
// 3x3 convolutions are Winograd's F(4, 3) along the height (Lavin and Gray, arXiv:1509.09308): half of the
// multiplications, and nothing to shuffle between lanes. Accumulators are always float32.

#include <omp.h>

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif

// Lanes of a vector, and how many accumulators leave registers for the rest.
#if defined(__AVX512F__)
enum { LANES = 16, MOST_OUTPUTS = 28 };
#elif defined(__AVX__)
enum { LANES = 8, MOST_OUTPUTS = 12 };
#elif defined(__aarch64__)
enum { LANES = 4, MOST_OUTPUTS = 24 };
#else
enum { LANES = 4, MOST_OUTPUTS = 12 };
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

enum Kind { LOAD_IMAGE, POINTWISE, CONV3X3, DEPTHWISE, CHANNEL_NORM };
enum Activation { NO_ACTIVATION, SILU, GELU };
enum Combination { NOTHING, ADD, MULTIPLY, GATE };
enum { AT_ONCE = 4 };  // vectors whose sums a depthwise convolution has in registers
enum { STRIP = 16 };   // vectors of a row that are in the making at once, so that they stay in a cache
enum { MOST_PLANES = 1024, MOST_INPUTS = 16 };  // of an operation

// A map: its first word inside the border, the distance of its rows, and how many rows it keeps.
struct Map {
    float *data;
    int64_t row;
    int32_t rows, channels, is_bfloat16;
};

struct Operation {
    int32_t kind, activation, combination;
    int32_t lag;                  // by how many steps it follows the first of its group
    int32_t kernel, dilation;     // of DEPTHWISE
    int32_t outputs, blocks;      // of a convolution: channels in a block of accumulators, and blocks
    int32_t inputs;               // how many maps are read, one after the other; all have the same planes
    Map input[MOST_INPUTS];
    Map other;                    // what the result is combined with
    Map output;                   // unless it is an image
    const float *weight, *bias;   // see pack in program.py; of LOAD_IMAGE and CHANNEL_NORM factor and summand
    float *image;                 // of LOAD_IMAGE what is read; of a convolution, if any, what its pixel shuffle writes
    int64_t image_plane, image_row;
    int32_t scale;                // of the pixel shuffle
    float epsilon;                // of CHANNEL_NORM
};

// Of the image, and of the maps: planes are `pitch` words apart, and above and below the image there are `zeros`.
struct Size {
    int32_t height, width;
    int64_t pitch;
    float *zeros;
};

static inline float *row_of(const Map &map, const Size &size, int y) {
    return y < 0 || y >= size.height ? size.zeros : map.data + y % map.rows * map.row;
}

static inline Vector load(const float *from) { return *(const UnalignedVector *)from; }
static inline void store(float *to, Vector value) { *(UnalignedVector *)to = value; }
static inline Vector broadcast(float value) { return Vector{} + value; }
static inline Vector select(Integers condition, Vector yes, Vector no) {
    return (Vector)((condition & (Integers)yes) | (~condition & (Integers)no));
}

static inline Vector minimum(Vector x, Vector y) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)x, (__m512)y);
#else
    return select(x < y, x, y);
#endif
}

static inline Vector maximum(Vector x, Vector y) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return select(x > y, x, y);
#endif
}

// COARSE ones are for what is rounded to bfloat16 afterwards: right to 13 bits instead of 23.
template <bool COARSE>
static inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
    const Vector guess = (Vector)_mm512_rcp14_ps((__m512)x);
    return COARSE ? guess : guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// 2^x, for x from -126 to 126. Beyond, the coarse one with AVX512 goes on to 0 and infinity, and the others stay at the
// value of the nearer end. On [-0.5, 0.5] it is the polynomial that minimizes the largest relative error: 7.5e-8, of the
// coarse one 7.5e-5.
template <bool COARSE>
static inline Vector power_of_two(Vector x) {
#if defined(__AVX512F__)
    if (!COARSE) x = minimum(maximum(x, broadcast(-126.0f)), broadcast(126.0f));
    const Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, 8);
#else
    x = minimum(maximum(x, broadcast(-126.0f)), broadcast(126.0f));
    const Vector rounding = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves whole numbers
    const Vector whole = (x + rounding) - rounding;
#endif
    const Vector rest = x - whole;
    Vector power;
    if (COARSE) {
        power = rest * 0.0551716688f + 0.242611133f;
        power = power * rest + 0.693260986f;
        power = power * rest + 0.999928073f;
    } else {
        power = rest * 1.327647174e-3f + 9.675541540e-3f;
        power = power * rest + 5.550713276e-2f;
        power = power * rest + 2.402211972e-1f;
        power = power * rest + 6.931469671e-1f;
        power = power * rest + 1.0f;
    }
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    return power * (Vector)((__builtin_convertvector(whole, Integers) + 127) << 23);
#endif
}

template <bool COARSE>
static inline Vector sigmoid(Vector x) {
    return reciprocal<COARSE>(1.0f + power_of_two<COARSE>(x * -1.44269504f));
}

// x * Phi(x). Phi(-|x|) is e^(-x^2 / 2) times a polynomial in 1 / (1 + |x| / 4) that minimizes the largest relative error,
// 8.7e-8.
static inline Vector gelu(Vector x) {
    const Vector t = reciprocal<false>(1.0f + 0.25f * maximum(x, -x));
    Vector sum = broadcast(-9.920203522e-2f);
    sum = sum * t + 3.782429436e-1f;
    sum = sum * t - 3.407425011e-1f;
    sum = sum * t + 3.612539638e-1f;
    sum = sum * t - 2.563109241e-2f;
    sum = sum * t + 1.305102595e-1f;
    sum = sum * t + 9.529346865e-2f;
    sum = sum * t + 2.750285368e-4f;
    const Vector tail = sum * power_of_two<false>(x * x * -0.72134752f);
    return x * select(x < 0.0f, tail, 1.0f - tail);
}

#if HAS_BFLOAT16
static inline Vector low_half(const float *from) {
    return (Vector)_mm512_slli_epi32(_mm512_loadu_si512(from), 16);
}
static inline Vector high_half(const float *from) {
    return (Vector)_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32((int)0xffff0000u));
}
static inline void store_halves(float *to, Vector low, Vector high) {
    // All of the low ones come first here; in a map they take turns.
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i turns = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                           0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(turns, halves));
}
#endif

static inline int planes_of(const Map &map) { return map.is_bfloat16 ? (map.channels + 1) / 2 : map.channels; }

// A vector of one channel, of a row of a map from a pixel on.
static inline Vector load_channel(const float *row, int channel, bool is_bfloat16, int64_t pitch) {
#if HAS_BFLOAT16
    if (is_bfloat16) return channel % 2 ? high_half(row + channel / 2 * pitch) : low_half(row + channel / 2 * pitch);
#endif
    return load(row + channel * pitch);
}

// The first `count` lanes; the others become zeros.
static inline Vector first_lanes(Vector value, int count) {
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return select(lane < count, value, Vector{});
}

// The pixel shuffle: channels are a color, a row and a column of the scale * scale pixels that one becomes. RUN channels
// at a time are neighbors in the image.
template <int RUN>
static void store_shuffled(const Operation &op, const Size &size, const Vector *sums, int first, int count, int y, int x) {
    const int scale = op.scale, lanes = size.width - x < LANES ? size.width - x : LANES;
    for (int i = 0; i < count; i += RUN) {
        const int channel = first + i, phase = channel % (scale * scale);
        float *to = op.image + channel / (scale * scale) * op.image_plane +
                    ((int64_t)y * scale + phase / scale) * op.image_row + (int64_t)x * scale + phase % scale;
        float values[RUN][LANES];
        for (int j = 0; j < RUN; j++) store(values[j], sums[i + j]);
        if (RUN > 1 && lanes == LANES) {
            for (int lane = 0; lane < LANES; lane++)
                for (int j = 0; j < RUN; j++) to[lane * RUN + j] = values[j][lane];
        } else {
            for (int lane = 0; lane < lanes; lane++)
                for (int j = 0; j < RUN; j++) to[lane * scale + j] = values[j][lane];
        }
    }
}

// Everything behind the sums of `count` channels from `first` on: activation, combination, and the store.
template <bool COARSE>
static inline void finish_as(const Operation &op, const Size &size, Vector *sums, int first, int count, int y, int x) {
    if (y >= size.height) return;
    if (count > op.output.channels - first) count = op.output.channels - first;
    switch (op.activation) {
        case SILU:
            for (int i = 0; i < count; i++) sums[i] = sums[i] * sigmoid<COARSE>(sums[i]);
            break;
        case GELU:
            for (int i = 0; i < count; i++) sums[i] = gelu(sums[i]);
            break;
    }
    if (op.combination != NOTHING) {
        const float *row = row_of(op.other, size, y) + x;
        for (int i = 0; i < count; i++) {
            const Vector other = load_channel(row, first + i, op.other.is_bfloat16, size.pitch);
            if (op.combination == ADD) sums[i] = sums[i] + other;
            else if (op.combination == MULTIPLY) sums[i] = sums[i] * other;
            else sums[i] = (sums[i] + other) * (sigmoid<COARSE>(sums[i]) - 0.5f);
        }
    }
    if (op.image) {
        const int scale = op.scale;
        if (scale == 4 && first % 4 == 0) return store_shuffled<4>(op, size, sums, first, count, y, x);
        if (scale == 3 && first % 3 == 0) return store_shuffled<3>(op, size, sums, first, count, y, x);
        if (scale == 2 && first % 2 == 0) return store_shuffled<2>(op, size, sums, first, count, y, x);
        for (int i = 0; i < count; i++) store_shuffled<1>(op, size, sums + i, first + i, 1, y, x);
        return;
    }
    if (x + LANES > size.width)  // what is right of the image has to stay zero
        for (int i = 0; i < count; i++) sums[i] = first_lanes(sums[i], size.width - x);
    float *row = row_of(op.output, size, y) + x;
#if HAS_BFLOAT16
    if (op.output.is_bfloat16) {
        for (int i = 0; i < count; i += 2)
            store_halves(row + (first + i) / 2 * size.pitch, sums[i], i + 1 < count ? sums[i + 1] : Vector{});
        return;
    }
#endif
    for (int i = 0; i < count; i++) store(row + (first + i) * size.pitch, sums[i]);
}

static void finish(const Operation &op, const Size &size, Vector *sums, int first, int count, int y, int x) {
    (op.output.is_bfloat16 ? finish_as<true> : finish_as<false>)(op, size, sums, first, count, y, x);
}

// Sums of N outputs at VECTORS * LANES pixels: over the planes, and `taps` pixels side by side from `offset` on in each.
// The weights are (planes, taps, N), a pair of bfloat16 each where the planes are pairs. FIRST to LAST of the outputs
// are in registers at a time.
template <int N, int FIRST, int LAST, int VECTORS, bool PAIRS>
static inline void sum_part(const float *const *planes, int count, int64_t offset, int taps, const float *weight,
                            const float *bias, Vector *const *sums) {
    Vector sum[VECTORS][LAST - FIRST];
#pragma GCC unroll 28
    for (int i = 0; i < LAST - FIRST; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sum[v][i] = bias ? broadcast(bias[FIRST + i]) : Vector{};
    for (int plane = 0; plane < count; plane++)
        for (int tap = 0; tap < taps; tap++, weight += N) {
            const float *from = planes[plane] + offset + tap;
            Vector x[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 28
            for (int i = 0; i < LAST - FIRST; i++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++)
#if HAS_BFLOAT16
                    if (PAIRS) {
                        const __m512i pair = _mm512_set1_epi32(((const int32_t *)weight)[FIRST + i]);
                        sum[v][i] = (Vector)_mm512_dpbf16_ps((__m512)sum[v][i], (__m512bh)x[v], (__m512bh)pair);
                    } else
#endif
                        sum[v][i] += x[v] * weight[FIRST + i];
        }
#pragma GCC unroll 28
    for (int i = 0; i < LAST - FIRST; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[v][FIRST + i] = sum[v][i];
}

template <int N, bool PAIRS>
static void sum_outputs(const float *const *planes, int count, int64_t offset, int taps, const float *weight,
                        const float *bias, int vectors, Vector *const *sums) {
    if (vectors == 2) {
        sum_part<N, 0, (N + 1) / 2, 2, PAIRS>(planes, count, offset, taps, weight, bias, sums);
        sum_part<N, (N + 1) / 2, N, 2, PAIRS>(planes, count, offset, taps, weight, bias, sums);
    } else {
        sum_part<N, 0, N, 1, PAIRS>(planes, count, offset, taps, weight, bias, sums);
    }
}

typedef void (*Sum)(const float *const *, int, int64_t, int, const float *, const float *, int, Vector *const *);

template <int N>
static Sum sum_function(int outputs, bool pairs) {
    if constexpr (N == 0) return nullptr;
    else if (outputs == N) return pairs ? sum_outputs<N, true> : sum_outputs<N, false>;
    else return sum_function<N - 1>(outputs, pairs);
}

static void load_image(const Operation &op, const Size &size, int y) {
    for (int channel = 0; channel < op.output.channels; channel++) {
        const float *from = op.image + channel * op.image_plane + y * op.image_row;
        float *to = row_of(op.output, size, y) + channel * size.pitch;
        for (int x = 0; x < size.width; x++) to[x] = from[x] * op.weight[channel] + op.bias[channel];
    }
}

static void pointwise(const Operation &op, const Size &size, const float **planes, int y) {
    const int each = planes_of(op.input[0]), count = each * op.inputs;
    for (int i = 0; i < count; i++) {
        planes[i] = row_of(op.input[i / each], size, y) + i % each * size.pitch;
    }
    const Sum sum = sum_function<MOST_OUTPUTS>(op.outputs, op.input[0].is_bfloat16);
    Vector sums[2][MOST_OUTPUTS], *const to[2] = {sums[0], sums[1]};
    for (int x = 0; x < size.width; x += 2 * LANES) {
        const int vectors = size.width - x > LANES ? 2 : 1;
        for (int i = 0; i < count; i++) {
            __builtin_prefetch(planes[i] + x + 2 * LANES);
            __builtin_prefetch(planes[i] + x + 3 * LANES);
        }
        for (int block = 0; block < op.blocks; block++) {
            const float *weight = op.weight + (int64_t)block * count * op.outputs;
            sum(planes, count, x, 1, weight, op.bias + block * op.outputs, vectors, to);
            for (int i = 0; i < vectors; i++)
                finish(op, size, sums[i], block * op.outputs, op.outputs, y, x + i * LANES);
        }
    }
}

// Winograd's transforms for 4 rows of results from 6 rows, with the points 0, +-NEAR, +-FAR and infinity. Of all such
// points these make about the smallest errors when the transformed values are rounded to bfloat16: 1.1 times those of a
// plain convolution, where the usual 1 and 2 make 1.5 times as large ones.
static const float NEAR = 0.75f, FAR = 1.25f, NEAR2 = NEAR * NEAR, FAR2 = FAR * FAR;
enum { ROWS = 4, POINTS = ROWS + 2 };

static inline void transform_input(const Vector *d, Vector *u) {
    u[0] = NEAR2 * FAR2 * d[0] - (NEAR2 + FAR2) * d[2] + d[4];
    const Vector even1 = d[4] - FAR2 * d[2], odd1 = NEAR * (d[3] - FAR2 * d[1]);
    u[1] = even1 + odd1;
    u[2] = even1 - odd1;
    const Vector even2 = d[4] - NEAR2 * d[2], odd2 = FAR * (d[3] - NEAR2 * d[1]);
    u[3] = even2 + odd2;
    u[4] = even2 - odd2;
    u[5] = NEAR2 * FAR2 * d[1] - (NEAR2 + FAR2) * d[3] + d[5];
}

static inline void transform_output(const Vector *m, Vector bias, Vector *rows) {
    const Vector even1 = m[1] + m[2], odd1 = NEAR * (m[1] - m[2]), even2 = m[3] + m[4], odd2 = FAR * (m[3] - m[4]);
    rows[0] = bias + m[0] + even1 + even2;
    rows[1] = bias + odd1 + odd2;
    rows[2] = bias + NEAR2 * even1 + FAR2 * even2;
    rows[3] = bias + NEAR2 * odd1 + FAR2 * odd2 + m[5];
}

// Words of scratch memory that a thread needs for operations on so many planes; most of all `conv3x3` does.
enum { ROW_OF_STRIP = (STRIP + 1) * LANES };
static int64_t scratch_words(int planes) {
    return (int64_t)POINTS * planes * ROW_OF_STRIP + POINTS * STRIP * MOST_OUTPUTS * LANES;
}

// ROWS rows of a 3x3 convolution, from row y on.
static void conv3x3(const Operation &op, const Size &size, const float **planes, float *scratch, int y) {
    const Map &map = op.input[0];
    const int count = planes_of(map);
    float *transformed = scratch;
    Vector *products = (Vector *)(scratch + (int64_t)POINTS * count * ROW_OF_STRIP);
    const Sum sum = sum_function<MOST_OUTPUTS>(op.outputs, map.is_bfloat16);
    const float *from[POINTS];
    for (int row = 0; row < POINTS; row++) from[row] = row_of(map, size, y - 1 + row);
    for (int start = 0; start < size.width; start += STRIP * LANES) {
        const int left = (size.width - start + LANES - 1) / LANES, vectors = left < STRIP ? left : STRIP;
        for (int plane = 0; plane < count; plane++)
            for (int i = 0; i <= vectors; i++) {
                const int64_t offset = plane * size.pitch + start - 1 + i * LANES;
                float *to = transformed + (int64_t)plane * ROW_OF_STRIP + i * LANES;
                Vector d[POINTS], u[POINTS];
#if HAS_BFLOAT16
                if (map.is_bfloat16) {
                    Vector upper[POINTS];
                    for (int row = 0; row < POINTS; row++) d[row] = low_half(from[row] + offset);
                    transform_input(d, u);
                    for (int row = 0; row < POINTS; row++) d[row] = high_half(from[row] + offset);
                    transform_input(d, upper);
                    for (int point = 0; point < POINTS; point++)
                        store_halves(to + (int64_t)point * count * ROW_OF_STRIP, u[point], upper[point]);
                    continue;
                }
#endif
                for (int row = 0; row < POINTS; row++) d[row] = load(from[row] + offset);
                transform_input(d, u);
                for (int point = 0; point < POINTS; point++) store(to + (int64_t)point * count * ROW_OF_STRIP, u[point]);
            }
        for (int block = 0; block < op.blocks; block++) {
            for (int point = 0; point < POINTS; point++) {
                const float *weight = op.weight + ((int64_t)block * POINTS + point) * count * 3 * op.outputs;
                for (int plane = 0; plane < count; plane++)
                    planes[plane] = transformed + ((int64_t)point * count + plane) * ROW_OF_STRIP;
                for (int i = 0; i < vectors; i += 2) {
                    Vector *const to[2] = {products + (i * POINTS + point) * op.outputs,
                                           products + ((i + 1) * POINTS + point) * op.outputs};
                    sum(planes, count, i * LANES, 3, weight, nullptr, vectors - i > 1 ? 2 : 1, to);
                }
            }
            for (int i = 0; i < vectors; i++) {
                Vector rows[ROWS][MOST_OUTPUTS];
                for (int output = 0; output < op.outputs; output++) {
                    Vector m[POINTS], result[ROWS];
                    for (int point = 0; point < POINTS; point++)
                        m[point] = products[(i * POINTS + point) * op.outputs + output];
                    const Vector bias = broadcast(op.bias[block * op.outputs + output]);
                    transform_output(m, bias, result);
                    for (int row = 0; row < ROWS; row++) rows[row][output] = result[row];
                }
                for (int row = 0; row < ROWS; row++)
                    finish(op, size, rows[row], block * op.outputs, op.outputs, y + row, start + i * LANES);
            }
        }
    }
}

template <int KERNEL, bool PAIRS>
static void depthwise(const Operation &op, const Size &size, Vector *sums, int y) {
    enum { TAPS = KERNEL * KERNEL, CHANNELS = PAIRS ? 2 : 1 };
    const Map &map = op.input[0];
    const int reach = KERNEL / 2 * op.dilation, planes = planes_of(map);
    const float *rows[KERNEL];
    for (int row = 0; row < KERNEL; row++) rows[row] = row_of(map, size, y - reach + row * op.dilation) - reach;
    for (int start = 0; start < size.width; start += STRIP * LANES) {
        const int end = start + STRIP * LANES < size.width ? start + STRIP * LANES : size.width;
        for (int plane = 0; plane < planes; plane++)
            for (int x = start; x < end; x += AT_ONCE * LANES) {
                const float *weight = op.weight + plane * CHANNELS * TAPS, *bias = op.bias + plane * CHANNELS;
                Vector low[AT_ONCE], high[AT_ONCE];
#pragma GCC unroll 4
                for (int i = 0; i < AT_ONCE; i++) low[i] = broadcast(bias[0]), high[i] = broadcast(bias[CHANNELS - 1]);
                for (int row = 0; row < KERNEL; row++) {
                    const float *from = rows[row] + plane * size.pitch + x;
                    for (int column = 0; column < KERNEL; column++, weight++, from += op.dilation)
#pragma GCC unroll 4
                        for (int i = 0; i < AT_ONCE; i++) {
#if HAS_BFLOAT16
                            if (PAIRS) {
                                low[i] += low_half(from + i * LANES) * weight[0];
                                high[i] += high_half(from + i * LANES) * weight[TAPS];
                                continue;
                            }
#endif
                            low[i] += load(from + i * LANES) * weight[0];
                        }
                }
                Vector *to = sums + ((x - start) / LANES * planes + plane) * CHANNELS;
                for (int i = 0; i < AT_ONCE; i++, to += planes * CHANNELS) {
                    to[0] = low[i];
                    if (PAIRS) to[1] = high[i];
                }
            }
        for (int x = start; x < end; x += LANES)
            finish(op, size, sums + (x - start) / LANES * planes * CHANNELS, 0, planes * CHANNELS, y, x);
    }
}

static void depthwise(const Operation &op, const Size &size, Vector *sums, int y) {
    const bool pairs = op.input[0].is_bfloat16;
    if (op.kernel == 3) pairs ? depthwise<3, true>(op, size, sums, y) : depthwise<3, false>(op, size, sums, y);
    else pairs ? depthwise<5, true>(op, size, sums, y) : depthwise<5, false>(op, size, sums, y);
}

// At each pixel over the channels: to mean 0 and variance 1, times `weight`, plus `bias`.
static void channel_norm(const Operation &op, const Size &size, Vector *values, int y) {
    const int channels = op.output.channels;
    const float *row = row_of(op.input[0], size, y);
    for (int x = 0; x < size.width; x += LANES) {
        Vector mean{}, variance{};
        for (int c = 0; c < channels; c++)
            mean += values[c] = load_channel(row + x, c, op.input[0].is_bfloat16, size.pitch);
        mean /= (float)channels;
        for (int c = 0; c < channels; c++) variance += (values[c] - mean) * (values[c] - mean);
        variance = variance / (float)channels + op.epsilon;
        Vector factor;
        for (int i = 0; i < LANES; i++) factor[i] = 1.0f / __builtin_sqrtf(variance[i]);
        for (int c = 0; c < channels; c++) values[c] = (values[c] - mean) * factor * op.weight[c] + op.bias[c];
        finish(op, size, values, 0, channels, y, x);
    }
}

extern "C" {

int most_outputs() { return MOST_OUTPUTS; }
int has_bfloat16() { return HAS_BFLOAT16; }
int64_t operation_bytes() { return sizeof(Operation); }
int most_planes() { return MOST_PLANES; }
int most_inputs() { return MOST_INPUTS; }
int64_t scratch(int planes) { return scratch_words(planes); }

// Run a group of `count` operations in steps of `strips` strips of ROWS rows, by `threads` threads, which have `words` of
// `scratch` each.
void run(const Operation *operations, int count, const Size *size, int strips, int threads, float *scratch, int64_t words) {
    int steps = (size->height + ROWS * strips - 1) / (ROWS * strips), last = 0;
    for (int i = 0; i < count; i++) last = operations[i].lag > last ? operations[i].lag : last;
    steps += last;
#pragma omp parallel num_threads(threads)
    {
        float *mine = scratch + omp_get_thread_num() * words;
        const float *planes[MOST_PLANES];
        for (int step = 0; step < steps; step++) {
#pragma omp for schedule(dynamic, 1)
            for (int task = count * strips - 1; task >= 0; task--) {  // the last operation is the largest
                const Operation &op = operations[task / strips];
                if (step < op.lag) continue;
                const int first = ((step - op.lag) * strips + task % strips) * ROWS;
                const int rows = op.kind == CONV3X3 ? ROWS : 1;
                for (int y = first; y < first + ROWS && y < size->height; y += rows) switch (op.kind) {
                    case LOAD_IMAGE: load_image(op, *size, y); break;
                    case POINTWISE: pointwise(op, *size, planes, y); break;
                    case CONV3X3: conv3x3(op, *size, planes, mine, y); break;
                    case DEPTHWISE: depthwise(op, *size, (Vector *)mine, y); break;
                    case CHANNEL_NORM: channel_norm(op, *size, (Vector *)mine, y); break;
                }
            }
        }
    }
}
}
