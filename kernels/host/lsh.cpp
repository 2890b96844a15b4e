// MagicPIG's half on the host (https://arxiv.org/abs/2410.16179): which tokens share buckets with a query, and
// attention to them. Nothing here knows of Python or PyTorch, and no exception leaves it: `tidal_lsh_attend` takes one
// pointer, so that it may be the host function of a CUDA stream.
//
// The unit of work is a query head and a part of its tokens, so that there is work for any number of threads. A bucket
// lists its tokens in ascending order, so a part of it is found by bisection, and no two threads share a counter. The
// parts of a head are joined by their log-sum-exps.
//
// The inner loops are written once, in plain C++ that compilers vectorize, and compiled once for each instruction set:
// `path` picks one of them at run time, and the binary needs none of them.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#define HAS_X86 1
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_BF16 1
#include <immintrin.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t AHEAD = 8;        // rows, or buckets, that are fetched before they are needed
constexpr int64_t LINE = 64;        // bytes of a cache line
constexpr int64_t TILE = 16;        // tables whose codes `fill` reads at once: half a cache line of a token's codes
constexpr int64_t STEPS = 1 << 14;  // of the table of -log(u + epsilon): it errs less than a float32 cosine does
constexpr int64_t NEAR = 4096;      // indexed tokens before or behind those of interest: a bucket has few, or is bisected
constexpr int64_t SHORTEST = 512;   // tokens of a part: shorter ones would only bisect
constexpr float PI = 3.14159265358979323846f;

enum Path { PORTABLE, AVX2, AVX512, AVX512BF16 };
enum Status { DONE, NO_MEMORY, WRONG_CODE };

}  // namespace

// The order of fields is that of `_Fill` in `__init__.py`.
struct TidalLshFill {
    const int16_t* codes;  // [B, Hkv, S, L]
    const int64_t* span;   // [B, 2]: the first slot, and the one after the last
    uint32_t* starts;      // [B, Hkv, L, 2^bits + 1]
    void* ids;             // [B, Hkv, L, S] uint16 or uint32
    int64_t batch, kv_heads, slots, tables, bits, wide, threads;
    int64_t status;  // of what was done
};

// The order of fields is that of `Arguments` in `__init__.py`.
struct TidalLshAttend {
    const void* keys;          // [B, Hkv, S, D] bfloat16 or float32
    const void* values;        // as the keys
    const uint32_t* starts;    // [B, Hkv, L, 2^bits + 1]
    const void* ids;           // [B, Hkv, L, S] uint16 or uint32
    const int64_t* span;       // [B, 2]: the slots of interest
    const void* query;         // [B, Hq, D] bfloat16 or float32
    const int16_t* codes;      // [B, Hq, L]
    const float* mean;         // [B, Hkv, D]
    const int64_t* filled;     // [B, 2]: the slots that are indexed, `span` or more
    const uint8_t* valid;      // [B, S], or null: all are
    const float* bias;         // [B, S]: added to the scores, or null
    const float* corrections;  // [STEPS + 2]: of tidal_lsh_corrections, for these bits, tables, tau and epsilon
    float* out;                // [B, Hq, D]
    float* lse;                // [B, Hq]
    int64_t batch, query_heads, kv_heads, slots, head_dim, tables, bits, tau;
    int64_t keys_bf16, query_bf16, wide, threads, path;
    double scale, softcap;
    int64_t status;  // of what was done
};

namespace {

// Memory of a thread, kept from call to call.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;

    char* of(size_t bytes) {
        if (bytes > size) {
            free(memory);
            bytes = (bytes + LINE - 1) / LINE * LINE;
            memory = static_cast<char*>(aligned_alloc(LINE, bytes));
            size = memory ? bytes : 0;
        }
        return memory;
    }
    ~Scratch() { free(memory); }
};

thread_local Scratch of_thread, of_call;

// Arrays, one after another, that start at cache lines. Without memory it measures how much they need.
struct Arrays {
    char* memory;
    size_t used = 0;

    template <class T> T* next(int64_t count) {
        T* array = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (count * sizeof(T) + LINE - 1) / LINE * LINE;
        return array;
    }
};

INLINE float as_float(uint32_t bits) {
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

INLINE float widen(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

// Of two bfloat16 numbers in a row, which are read as one of 32 bits: vectors need not change their width.
INLINE uint32_t pair_at(const uint16_t* numbers) {
    uint32_t result;
    memcpy(&result, numbers, sizeof(result));
    return result;
}

INLINE float even(uint32_t pair) { return as_float(pair << 16); }

INLINE float odd(uint32_t pair) { return as_float(pair & 0xFFFF0000u); }

// Where number d of `dim` is if keys are bfloat16: first the even ones, then the odd ones, and one without a pair.
INLINE int64_t split(int64_t d, int64_t dim) { return d == dim / 2 * 2 ? d : d / 2 + d % 2 * (dim / 2); }

INLINE void fetch(const void* memory, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(static_cast<const char*>(memory) + at);
}

// P[Binomial(tables, t) >= tau], by the shorter of the two tails: terms of one sign, the largest one first.
double inclusion(double t, int64_t tables, int64_t tau) {
    if (!(t > 0)) return 0;
    if (t >= 1) return tau <= tables;
    const double odds = t / (1 - t);
    const bool upper = tables * t < tau;
    int64_t j = upper ? tau : tau - 1;
    if (j > tables) return 0;
    double log_term = j * log(t) + (tables - j) * log1p(-t);
    for (int64_t i = 0; i < j; ++i) log_term += log((tables - i) / (i + 1.0));
    double term = exp(log_term), sum = term;
    if (upper) {
        for (; j < tables && term > sum * 1e-17; ++j) sum += term *= (tables - j) / (j + 1.0) * odds;
        return std::min(sum, 1.0);
    }
    for (; j > 0 && term > sum * 1e-17; --j) sum += term *= j / (tables - j + 1.0) / odds;
    return std::max(1 - sum, 0.0);
}

// -log(u + epsilon) of a token whose codes agree with the query's, bit by bit, with this probability.
float correction(double agreement, int64_t bits, int64_t tables, int64_t tau, double epsilon) {
    const double u = inclusion(pow(agreement, static_cast<double>(bits)), tables, tau);
    return static_cast<float>(-log(std::max(u + epsilon, static_cast<double>(FLT_MIN))));
}

// Tokens of interest of a batch row.
int64_t length_of(const TidalLshAttend& call, int64_t row) {
    return std::max(call.span[2 * row + 1] - call.span[2 * row], int64_t(0));
}

// What a unit of work reads and writes. `dots` become logits, and logits weights.
struct Unit {
    const TidalLshAttend* call;
    int64_t row, kv_head, head, begin, end;
    uint8_t* counts;    // [end - begin]: hits, all 0 between units
    uint32_t* found;    // [end - begin + 1]: tokens
    int64_t num_found;
    float *dots, *squares;  // [end - begin]: of query and key, and of the centred key with itself
    float *query, *mean;    // [D], in the order of `split` if keys are bfloat16
    const void **bucket, **bucket_end;  // [L]
    float lse;
    float* out;  // [D]
};

template <class Id> void look_up(Unit& unit) {
    const TidalLshAttend& call = *unit.call;
    const int64_t table = (unit.row * call.kv_heads + unit.kv_head) * call.tables, buckets = int64_t(1) << call.bits;
    const int16_t* codes = call.codes + (unit.row * call.query_heads + unit.head) * call.tables;
    const Id** bucket = reinterpret_cast<const Id**>(unit.bucket);
    const Id** bucket_end = reinterpret_cast<const Id**>(unit.bucket_end);
    const bool near_first = unit.begin - call.filled[2 * unit.row] <= NEAR;
    const bool near_last = call.filled[2 * unit.row + 1] - unit.end <= NEAR;
    const uint8_t tau = static_cast<uint8_t>(call.tau);
    uint8_t* counts = unit.counts;
    uint32_t* found = unit.found;
    const auto before = [](Id id, int64_t slot) { return static_cast<int64_t>(id) < slot; };
    int64_t walked = 0, num_found = 0;

    for (int64_t l = 0; l < call.tables; ++l) {
        const Id* ids = static_cast<const Id*>(call.ids) + (table + l) * call.slots;
        bucket[l] = bucket_end[l] = ids;
        if (codes[l] < 0 || codes[l] >= buckets) continue;  // no token has such a code
        const uint32_t* start = call.starts + (table + l) * (buckets + 1) + codes[l];
        bucket[l] = ids + start[0];
        bucket_end[l] = ids + start[1];
    }
    for (int64_t l = 0; l < call.tables; ++l) {
        if (l + AHEAD < call.tables)
            fetch(bucket[l + AHEAD], (bucket_end[l + AHEAD] - bucket[l + AHEAD]) * int64_t(sizeof(Id)));
        if (!near_first) bucket[l] = std::lower_bound(bucket[l], bucket_end[l], unit.begin, before);
        if (!near_last) bucket_end[l] = std::lower_bound(bucket[l], bucket_end[l], unit.end, before);
        while (bucket[l] < bucket_end[l] && before(*bucket[l], unit.begin)) ++bucket[l];
        while (bucket[l] < bucket_end[l] && !before(bucket_end[l][-1], unit.end)) --bucket_end[l];
        walked += bucket_end[l] - bucket[l];
        for (const Id* id = bucket[l]; id < bucket_end[l]; ++id) {
            uint8_t& count = counts[*id - unit.begin];
            found[num_found] = *id;
            num_found += count + 1 == tau;
            count += count < tau;  // no further: it may not wrap around
        }
    }
    if (walked * LINE > unit.end - unit.begin)
        memset(counts, 0, unit.end - unit.begin);
    else
        for (int64_t l = 0; l < call.tables; ++l)
            for (const Id* id = bucket[l]; id < bucket_end[l]; ++id) counts[*id - unit.begin] = 0;

    unit.num_found = num_found;
    if (call.valid) {
        const uint8_t* valid = call.valid + unit.row * call.slots;
        unit.num_found = 0;
        for (int64_t j = 0; j < num_found; ++j) {
            found[unit.num_found] = found[j];
            unit.num_found += valid[found[j]] != 0;
        }
    }
}

template <class T> INLINE const T* rows_of(const Unit& unit, const void* cache) {
    const TidalLshAttend& call = *unit.call;
    return static_cast<const T*>(cache) + (unit.row * call.kv_heads + unit.kv_head) * call.slots * call.head_dim;
}

INLINE void measure_f32(Unit& unit) {
    const int64_t dim = unit.call->head_dim;
    const float *rows = rows_of<float>(unit, unit.call->keys), *query = unit.query, *mean = unit.mean;
    for (int64_t j = 0; j < unit.num_found; ++j) {
        if (j + AHEAD < unit.num_found) fetch(rows + unit.found[j + AHEAD] * dim, dim * sizeof(float));
        const float* row = rows + unit.found[j] * dim;
        float dot = 0, square = 0;
        for (int64_t d = 0; d < dim; ++d) {
            const float centred = row[d] - mean[d];
            dot += query[d] * row[d];
            square += centred * centred;
        }
        unit.dots[j] = dot;
        unit.squares[j] = square;
    }
}

INLINE void measure_bf16(Unit& unit) {
    const int64_t dim = unit.call->head_dim, half = dim / 2;
    const uint16_t* rows = rows_of<uint16_t>(unit, unit.call->keys);
    const float *query = unit.query, *mean = unit.mean;
    for (int64_t j = 0; j < unit.num_found; ++j) {
        if (j + AHEAD < unit.num_found) fetch(rows + unit.found[j + AHEAD] * dim, dim * sizeof(uint16_t));
        const uint16_t* row = rows + unit.found[j] * dim;
        float dot = 0, square = 0, odd_dot = 0, odd_square = 0;
        for (int64_t d = 0; d < half; ++d) {
            const uint32_t pair = pair_at(row + 2 * d);
            const float x = even(pair) - mean[d], y = odd(pair) - mean[half + d];
            dot += query[d] * even(pair);
            odd_dot += query[half + d] * odd(pair);
            square += x * x;
            odd_square += y * y;
        }
        for (int64_t d = 2 * half; d < dim; ++d) {
            const float x = widen(row[d]) - mean[d];
            dot += query[d] * widen(row[d]);
            square += x * x;
        }
        unit.dots[j] = dot + odd_dot;
        unit.squares[j] = square + odd_square;
    }
}

// The logits, which become weights that add up to 1, and their log-sum-exp.
INLINE void weigh(Unit& unit) {
    const TidalLshAttend& call = *unit.call;
    const int64_t count = unit.num_found;
    double query_dot_mean = 0, query_square = 0;
    for (int64_t d = 0; d < call.head_dim; ++d) {
        query_dot_mean += double(unit.query[d]) * unit.mean[d];
        query_square += double(unit.query[d]) * unit.query[d];
    }
    const float shift = static_cast<float>(query_dot_mean), norm = static_cast<float>(sqrt(query_square));
    const float scale = static_cast<float>(call.scale), cap = static_cast<float>(call.softcap);
    float *dots = unit.dots, *agreements = unit.squares;
    const float* corrections = call.corrections;
    const float* bias = call.bias ? call.bias + unit.row * call.slots : nullptr;

#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float both = norm * sqrtf(agreements[j]);
        float cosine = (dots[j] - shift) / (both > 0 ? both : INFINITY);
        cosine = std::abs(cosine) <= 1 ? cosine : cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : 0.0f;  // 0 for NaN
        // acos by Abramowitz and Stegun, 4.4.46: within 2e-8
        const float x = std::abs(cosine);
        float angle = -0.0012624911f;
        angle = angle * x + 0.0066700901f;
        angle = angle * x - 0.0170881256f;
        angle = angle * x + 0.0308918810f;
        angle = angle * x - 0.0501743046f;
        angle = angle * x + 0.0889789874f;
        angle = angle * x - 0.2145988016f;
        angle = angle * x + 1.5707963050f;
        angle *= sqrtf(1 - x) / PI;
        agreements[j] = cosine < 0 ? angle : 1 - angle;
    }
    float highest = -INFINITY;
    for (int64_t j = 0; j < count; ++j) {
        const float at = agreements[j] * STEPS;
        const int32_t step = static_cast<int32_t>(at);
        const float of_token = corrections[step] + (at - step) * (corrections[step + 1] - corrections[step]);
        float score = std::min(std::max(dots[j] * scale, -FLT_MAX / 2), FLT_MAX / 2);
        if (cap > 0) score = cap * tanhf(score / cap);
        if (bias) score += bias[unit.found[j]];
        dots[j] = score + of_token;
        highest = std::max(highest, dots[j]);
    }
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += dots[j] = expf(dots[j] - highest);
    unit.lse = count ? highest + static_cast<float>(log(sum)) : -INFINITY;
    const float share = static_cast<float>(1 / sum);
    for (int64_t j = 0; j < count; ++j) dots[j] *= share;
}

INLINE void add_f32(Unit& unit) {
    const int64_t dim = unit.call->head_dim;
    const float* rows = rows_of<float>(unit, unit.call->values);
    float* out = unit.out;
    std::fill(out, out + dim, 0.0f);
    for (int64_t j = 0; j < unit.num_found; ++j) {
        if (j + AHEAD < unit.num_found) fetch(rows + unit.found[j + AHEAD] * dim, dim * sizeof(float));
        const float *row = rows + unit.found[j] * dim, weight = unit.dots[j];
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) out[d] += weight * row[d];
    }
}

INLINE void add_bf16(Unit& unit) {
    const int64_t dim = unit.call->head_dim, half = dim / 2, last = std::max(unit.num_found - 1, int64_t(0));
    const uint16_t* rows = rows_of<uint16_t>(unit, unit.call->values);
    float* sums = unit.query;  // which isn't needed any more
    std::fill(sums, sums + dim, 0.0f);
    for (int64_t j = 0; j < unit.num_found; j += 4) {  // at once: each of them would load and store the sums
        for (int64_t next = j + AHEAD; next < std::min(j + AHEAD + 4, unit.num_found); ++next)
            fetch(rows + unit.found[next] * dim, dim * sizeof(uint16_t));
        const uint16_t* row[4];
        float weight[4];
        for (int64_t i = 0; i < 4; ++i) {
            row[i] = rows + unit.found[std::min(j + i, last)] * dim;
            weight[i] = j + i <= last ? unit.dots[j + i] : 0;
        }
#pragma omp simd
        for (int64_t d = 0; d < half; ++d) {
            const uint32_t a = pair_at(row[0] + 2 * d), b = pair_at(row[1] + 2 * d);
            const uint32_t c = pair_at(row[2] + 2 * d), e = pair_at(row[3] + 2 * d);
            sums[d] += weight[0] * even(a) + weight[1] * even(b) + (weight[2] * even(c) + weight[3] * even(e));
            sums[half + d] += weight[0] * odd(a) + weight[1] * odd(b) + (weight[2] * odd(c) + weight[3] * odd(e));
        }
        for (int64_t d = 2 * half; d < dim; ++d)
            for (int64_t i = 0; i < 4; ++i) sums[d] += weight[i] * widen(row[i][d]);
    }
    for (int64_t d = 0; d < dim; ++d) unit.out[d] = sums[split(d, dim)];
}

using Stage = void (*)(Unit&);

struct Stages {
    Stage measure_bf16, measure_f32, weigh, add_bf16, add_f32;
};

#define STAGES(NAME, TARGET)                                              \
    TARGET void NAME##_measure_bf16(Unit& unit) { measure_bf16(unit); }   \
    TARGET void NAME##_measure_f32(Unit& unit) { measure_f32(unit); }     \
    TARGET void NAME##_weigh(Unit& unit) { weigh(unit); }                 \
    TARGET void NAME##_add_bf16(Unit& unit) { add_bf16(unit); }           \
    TARGET void NAME##_add_f32(Unit& unit) { add_f32(unit); }             \
    constexpr Stages NAME##_stages{                                       \
        NAME##_measure_bf16, NAME##_measure_f32, NAME##_weigh, NAME##_add_bf16, NAME##_add_f32};

STAGES(portable, )
#if HAS_X86
STAGES(avx2, __attribute__((target("avx2,fma"))))
#ifdef __clang__
STAGES(avx512, __attribute__((target("avx512f,avx512bw,fma"))))
#else  // which would rather use half of a register
STAGES(avx512, __attribute__((target("avx512f,avx512bw,fma,prefer-vector-width=512"))))
#endif
#endif

#if HAS_BF16
// Of bfloat16 queries and keys: 32 products at a time. The centred key is float32 nevertheless.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma"))) void avx512bf16_measure(Unit& unit) {
    const int64_t dim = unit.call->head_dim, half = dim / 2;
    const uint16_t* rows = rows_of<uint16_t>(unit, unit.call->keys);
    const uint16_t* query = static_cast<const uint16_t*>(unit.call->query);
    query += (unit.row * unit.call->query_heads + unit.head) * dim;
    const float *mean = unit.mean, *odd_mean = unit.mean + half;
    const __m512i odd_bits = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (int64_t j = 0; j < unit.num_found; ++j) {
        if (j + AHEAD < unit.num_found) fetch(rows + unit.found[j + AHEAD] * dim, dim * sizeof(uint16_t));
        const uint16_t* row = rows + unit.found[j] * dim;
        __m512 dots = _mm512_setzero_ps(), squares = dots, odd_squares = dots;
        for (int64_t d = 0; d < half; d += 16) {
            const __mmask16 inside = half - d >= 16 ? 0xFFFF : (1 << (half - d)) - 1;
            const __m512i pairs = _mm512_maskz_loadu_epi32(inside, row + 2 * d);
            const __m512i of_query = _mm512_maskz_loadu_epi32(inside, query + 2 * d);
            const __m512 evens = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 odds = _mm512_castsi512_ps(_mm512_and_si512(pairs, odd_bits));
            const __m512 x = _mm512_sub_ps(evens, _mm512_maskz_loadu_ps(inside, mean + d));
            const __m512 y = _mm512_sub_ps(odds, _mm512_maskz_loadu_ps(inside, odd_mean + d));
            dots = _mm512_dpbf16_ps(dots, (__m512bh)pairs, (__m512bh)of_query);
            squares = _mm512_fmadd_ps(x, x, squares);
            odd_squares = _mm512_fmadd_ps(y, y, odd_squares);
        }
        float dot = _mm512_reduce_add_ps(dots), square = _mm512_reduce_add_ps(_mm512_add_ps(squares, odd_squares));
        for (int64_t d = 2 * half; d < dim; ++d) {
            const float x = widen(row[d]) - mean[d];
            dot += widen(query[d]) * widen(row[d]);
            square += x * x;
        }
        unit.dots[j] = dot;
        unit.squares[j] = square;
    }
}
#endif

int64_t available() {
    int64_t paths = 1 << PORTABLE;
#if HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) paths |= 1 << AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
        paths |= 1 << AVX512;
#if HAS_BF16
        if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) paths |= 1 << AVX512BF16;
#endif
    }
#endif
    return paths;
}

Stages stages_of([[maybe_unused]] const TidalLshAttend& call) {
    Stages stages = portable_stages;
#if HAS_X86
    if (call.path == AVX2) stages = avx2_stages;
    if (call.path >= AVX512) stages = avx512_stages;
#endif
#if HAS_BF16
    if (call.path == AVX512BF16 && call.query_bf16) stages.measure_bf16 = avx512bf16_measure;
#endif
    return stages;
}

// Lay a unit's arrays out in `memory`: -> how much they need.
size_t lay_out(Unit& unit, const TidalLshAttend& call, int64_t longest, char* memory) {
    Arrays arrays{memory};
    unit.counts = arrays.next<uint8_t>(longest);
    unit.found = arrays.next<uint32_t>(longest + 1);
    unit.dots = arrays.next<float>(longest);
    unit.squares = arrays.next<float>(longest);
    unit.query = arrays.next<float>(call.head_dim);
    unit.mean = arrays.next<float>(call.head_dim);
    unit.bucket = arrays.next<const void*>(call.tables);
    unit.bucket_end = arrays.next<const void*>(call.tables);
    return arrays.used;
}

// The query and the mean, as the stages read them.
void prepare(Unit& unit) {
    const TidalLshAttend& call = *unit.call;
    const int64_t dim = call.head_dim, at = (unit.row * call.query_heads + unit.head) * dim;
    const float* mean = call.mean + (unit.row * call.kv_heads + unit.kv_head) * dim;
    for (int64_t d = 0; d < dim; ++d) {
        const int64_t place = call.keys_bf16 ? split(d, dim) : d;
        unit.query[place] = call.query_bf16 ? widen(static_cast<const uint16_t*>(call.query)[at + d])
                                            : static_cast<const float*>(call.query)[at + d];
        unit.mean[place] = mean[d];
    }
}

void attend(Unit& unit, const Stages& stages) {
    const TidalLshAttend& call = *unit.call;
    prepare(unit);
    call.wide ? look_up<uint32_t>(unit) : look_up<uint16_t>(unit);
    (call.keys_bf16 ? stages.measure_bf16 : stages.measure_f32)(unit);
    stages.weigh(unit);
    (call.keys_bf16 ? stages.add_bf16 : stages.add_f32)(unit);
}

// Join the parts of a head.
void join(const float* lses, const float* outs, int64_t parts, int64_t dim, float* lse, float* out) {
    const float highest = *std::max_element(lses, lses + parts);
    std::fill(out, out + dim, 0.0f);
    *lse = highest;
    if (highest == -INFINITY) return;
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += exp(double(lses[part]) - highest);
    *lse = static_cast<float>(highest + log(sum));
    for (int64_t part = 0; part < parts; ++part) {
        const float weight = static_cast<float>(exp(double(lses[part]) - highest) / sum);
        for (int64_t d = 0; d < dim; ++d) out[d] += weight * outs[part * dim + d];
    }
}

template <class Id> bool fill_tile(const TidalLshFill& call, int64_t of_head, int64_t first_table, char* memory) {
    const int64_t buckets = int64_t(1) << call.bits, count = std::min(TILE, call.tables - first_table);
    const int64_t first = call.span[of_head / call.kv_heads * 2], last = call.span[of_head / call.kv_heads * 2 + 1];
    const int64_t length = last - first;
    Arrays arrays{memory};
    uint16_t* codes = arrays.next<uint16_t>(TILE * call.slots);
    uint32_t* cursors = arrays.next<uint32_t>(buckets);
    uint16_t seen = 0;
    for (int64_t i = 0; i < length; ++i) {
        const int16_t* of_token = call.codes + (of_head * call.slots + first + i) * call.tables + first_table;
        for (int64_t l = 0; l < count; ++l) {
            codes[l * length + i] = static_cast<uint16_t>(of_token[l]);
            seen |= static_cast<uint16_t>(of_token[l]);
        }
    }
    if (seen >= buckets) return false;
    for (int64_t l = 0; l < count; ++l) {
        const uint16_t* of_table = codes + l * length;
        uint32_t* starts = call.starts + (of_head * call.tables + first_table + l) * (buckets + 1);
        Id* ids = static_cast<Id*>(call.ids) + (of_head * call.tables + first_table + l) * call.slots;
        memset(starts, 0, (buckets + 1) * sizeof(uint32_t));
        for (int64_t i = 0; i < length; ++i) ++starts[of_table[i] + 1];
        for (int64_t code = 0; code < buckets; ++code) {
            cursors[code] = starts[code];
            starts[code + 1] += starts[code];
        }
        for (int64_t i = 0; i < length; ++i) ids[cursors[of_table[i]]++] = static_cast<Id>(first + i);
    }
    return true;
}

}  // namespace

extern "C" {

// Bit `path` is set where this processor has it.
int64_t tidal_lsh_paths() { return available(); }

// Ask for large pages: rows that are read here and there cost as much for looking their pages up as for a third of the
// row. Memory that has been written gets them later, or not.
void tidal_lsh_advise(void* memory, int64_t bytes) {
#ifdef __linux__
    const uintptr_t page = uintptr_t(1) << 21, address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// How many numbers `tidal_lsh_corrections` writes.
int64_t tidal_lsh_num_corrections() { return STEPS + 2; }

void tidal_lsh_corrections(int64_t bits, int64_t tables, int64_t tau, double epsilon, float* corrections) {
    for (int64_t step = 0; step <= STEPS; ++step)
        corrections[step] = correction(double(step) / STEPS, bits, tables, tau, epsilon);
    corrections[STEPS + 1] = corrections[STEPS];
}

void tidal_lsh_inclusion(const double* t, int64_t count, int64_t tables, int64_t tau, double* u) {
    for (int64_t i = 0; i < count; ++i) u[i] = inclusion(t[i], tables, tau);
}

void tidal_lsh_fill(void* args) {
    TidalLshFill& call = *static_cast<TidalLshFill*>(args);
    const int64_t tiles = (call.tables + TILE - 1) / TILE;
    Arrays sizes{nullptr};
    sizes.next<uint16_t>(TILE * call.slots);
    sizes.next<uint32_t>(int64_t(1) << call.bits);
    int64_t status = DONE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(call.threads)) reduction(max : status)
    for (int64_t tile = 0; tile < call.batch * call.kv_heads * tiles; ++tile) {
        char* memory = static_cast<char*>(aligned_alloc(LINE, sizes.used));
        int64_t result = NO_MEMORY;
        if (memory) {
            const int64_t of_head = tile / tiles, first_table = tile % tiles * TILE;
            const bool right = call.wide ? fill_tile<uint32_t>(call, of_head, first_table, memory)
                                         : fill_tile<uint16_t>(call, of_head, first_table, memory);
            result = right ? DONE : WRONG_CODE;
        }
        free(memory);
        status = std::max(status, result);
    }
    call.status = status;
}

void tidal_lsh_attend(void* args) {
    TidalLshAttend& call = *static_cast<TidalLshAttend*>(args);
    const int64_t heads = call.batch * call.query_heads, group = call.query_heads / call.kv_heads;
    int64_t longest = 0;
    for (int64_t row = 0; row < call.batch; ++row)
        longest = std::max(longest, length_of(call, row));
    // Some units for each thread, because they are not equally long. One part a head has nothing to bisect or to join.
    int64_t parts = heads ? (4 * call.threads + heads - 1) / heads : 1;
    parts = std::max(std::min(parts, longest / SHORTEST), int64_t(1));
    const int threads = static_cast<int>(std::max(std::min(call.threads, heads * parts), int64_t(1)));
    const Stages stages = stages_of(call);

    Arrays sizes{nullptr};
    sizes.next<float>(heads * parts);
    sizes.next<float>(heads * parts * call.head_dim);
    Arrays arrays{parts > 1 ? of_call.of(sizes.used) : nullptr};
    float *lses = call.lse, *outs = call.out;
    if (parts > 1) {
        if (!arrays.memory) {
            std::fill(call.lse, call.lse + heads, NAN);
            std::fill(call.out, call.out + heads * call.head_dim, NAN);
            call.status = NO_MEMORY;
            return;
        }
        lses = arrays.next<float>(heads * parts);
        outs = arrays.next<float>(heads * parts * call.head_dim);
    }
    int64_t status = DONE;
#pragma omp parallel num_threads(threads) reduction(max : status)
    {
        Unit unit{};
        const int64_t of_part = (longest + parts - 1) / parts;
        const size_t size = lay_out(unit, call, of_part, nullptr);
        char* memory = of_thread.of(size);
        if (memory) {
            lay_out(unit, call, of_part, memory);
            memset(unit.counts, 0, of_part);
        } else {
            status = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t at = 0; at < heads * parts; ++at) {
            // The heads of a group, and the same part, one after another: they share many keys and values
            const int64_t member = at % group, part = at / group % parts, of_kv_head = at / group / parts;
            unit.call = &call;
            unit.row = of_kv_head / call.kv_heads;
            unit.kv_head = of_kv_head % call.kv_heads;
            unit.head = unit.kv_head * group + member;
            const int64_t first = call.span[2 * unit.row], length = length_of(call, unit.row);
            unit.begin = first + length * part / parts;
            unit.end = first + length * (part + 1) / parts;
            const int64_t place = (unit.row * call.query_heads + unit.head) * parts + part;
            unit.out = outs + place * call.head_dim;
            if (memory) {
                attend(unit, stages);
            } else {
                unit.lse = NAN;
                std::fill(unit.out, unit.out + call.head_dim, NAN);
            }
            lses[place] = unit.lse;
        }
        if (parts > 1) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < heads; ++head)
                join(
                    lses + head * parts, outs + head * parts * call.head_dim, parts, call.head_dim, call.lse + head,
                    call.out + head * call.head_dim);
        }
    }
    call.status = status;
}

}  // extern "C"
