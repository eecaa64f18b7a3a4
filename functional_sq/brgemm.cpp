// A product or convolution of codes, its scale, bias, residual, activation and the next codes, a tile at a time; of a
// product also the codes of real values. And codes of real values by themselves, and images in another order in memory.
//
// at::native::cpublas::brgemm multiplies a tile, by a kernel that oneDNN makes for its sizes; this file packs a weight as
// that wants it, and does what follows while the tile is in the cache. Compiled and called by brgemm.py.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

namespace {

using Reals = at::vec::Vectorized<float>;
using at::native::cpublas::brgemm;

constexpr int64_t ROWS = 128, COLUMNS = 64, DEPTH = 2048, LINE = 64, LANES = Reals::size();
constexpr size_t STREAMED = 1 << 24, NEW = 1 << 25;
static_assert(LANES == 16);

// What a product is made of; a null pointer: there is none.
struct Call {
  int64_t m, n, k, groups, activation;  // (M, K) for each group, N of all together
  at::ScalarType dtype;
  const void* q;         // codes, or real values that they are made of
  const float* q_scale;  // of real values
  const void* packed;
  const int32_t* sums;  // of each row of the weight's codes
  const int32_t* zero_point;
  const int32_t* weight_zero_point;
  const float* scale;
  const void* bias;
  at::ScalarType bias_dtype;
  const void* residual;
  const float* to_scale;
  const int32_t* to_zero_point;
  void* y;
  bool streamed;  // past the caches
};

// Integers in groups of 4 along K, as VNNI adds them; bfloat16 in groups of 2.
template <typename Code>
constexpr int64_t GROUP = sizeof(Code) == 1 ? 4 : 2;

bool has_amx() {
  static const bool answer = at::cpu::init_amx();
  return answer;
}

int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

// How many codes of a row are multiplied, with the zeros behind it: with AMX so many that the steps in which oneDNN
// takes them are few, and alike, as it takes the largest step that divides them, be it one group.
template <typename Code>
int64_t inner(int64_t k) {
  const int64_t steps = has_amx() ? parts(k, LINE / sizeof(Code)) : 1, together = GROUP<Code> * steps;
  return parts(k, together) * together;
}

// Ask for pages of 2 MB for what few rows stream from memory, before anything is written there.
void huge(void* memory, size_t bytes) {
  constexpr size_t PAGE = 1 << 21;
  const size_t begin = (reinterpret_cast<size_t>(memory) + PAGE - 1) & ~(PAGE - 1);
  const size_t end = (reinterpret_cast<size_t>(memory) + bytes) & ~(PAGE - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

int64_t tiles(int64_t n) { return parts(n, COLUMNS); }

// (N, K) -> (N / COLUMNS, K / GROUP, COLUMNS, GROUP), filled up with zeros; each of `groups` begins a tile of columns.
template <typename Code, typename From>
void pack(const uint8_t* codes, int64_t n, int64_t k, int64_t groups, Code* packed, From from) {
  constexpr int64_t together = GROUP<Code>;
  const int64_t each = n / groups, size = COLUMNS * inner<Code>(k), widths = tiles(each);
  huge(packed, groups * widths * size * sizeof(Code));
  at::parallel_for(0, groups * widths, 1, [&](int64_t begin, int64_t end) {
    std::fill(packed + begin * size, packed + end * size, Code(0));
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t j = tile % widths * COLUMNS; j < std::min(each, (tile % widths + 1) * COLUMNS); ++j) {
        const uint8_t* row = codes + (tile / widths * each + j) * k;
        Code* to = packed + tile * size + j % COLUMNS * together;
        for (int64_t i = 0; i < k; ++i) to[i / together * COLUMNS * together + i % together] = from(row[i]);
      }
  });
}

// An odd function that comes to 1, of polynomials that are chosen in registers.
template <int DEGREE>
class Odd {
  static constexpr int PIECES = 2 * LANES;
  alignas(64) float power[DEGREE + 1][PIECES] = {};
  float pieces;  // to 1 along x

 public:
  // Each goes through the zeros of a Chebyshev polynomial; the last is 1, from 0.98 of `end` on.
  Odd(double (*f)(double), double end) : pieces(static_cast<float>((PIECES - 1) / end)) {
    double node[DEGREE + 1], c[DEGREE + 1];
    for (int i = 0; i <= DEGREE; ++i) node[i] = std::cos((2 * i + 1) * M_PI / (2 * DEGREE + 2)) / 2;
    for (int piece = 0; piece < PIECES - 1; ++piece) {
      for (int i = 0; i <= DEGREE; ++i) c[i] = f((piece + node[i]) / pieces);
      for (int k = 1; k <= DEGREE; ++k)
        for (int i = DEGREE; i >= k; --i) c[i] = (c[i] - c[i - 1]) / (node[i] - node[i - k]);
      for (int k = DEGREE - 1; k >= 0; --k)
        for (int i = k; i < DEGREE; ++i) c[i] -= node[k] * c[i + 1];
      for (int i = 0; i <= DEGREE; ++i) power[i][piece] = static_cast<float>(c[i]);
    }
    power[0][PIECES - 1] = 1;
  }

  Reals operator()(Reals x) const {
    const Reals at = _mm512_min_ps(_mm512_set1_ps(PIECES - 1), x.abs() * Reals(pieces));  // NaN stays
    const __m512i piece = _mm512_cvtps_epi32(at);
    const Reals t = at - Reals(_mm512_cvtepi32_ps(piece));
    Reals y = of(DEGREE, piece);
    for (int i = DEGREE - 1; i >= 0; --i) y = at::vec::fmadd(y, t, of(i, piece));
    return _mm512_or_ps(y, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
  }

 private:
  Reals of(int i, __m512i piece) const {
    return _mm512_permutex2var_ps(_mm512_load_ps(power[i]), piece, _mm512_load_ps(power[i] + LANES));
  }
};

// Off by 1e-7 at most.
const Odd<4> NORMAL([](double x) { return std::erf(x * M_SQRT1_2); }, 5.65);
const Odd<5> TANH([](double x) { return std::tanh(x); }, 9.15);

// To 1e-7 of the result, and of what x is off by: half the time of Sleef's, and codes are far coarser.
inline Reals exp2(Reals x) {
  const Reals whole = x.round(), t = x - whole;
  Reals y(0.00132764701f);
  for (float power : {0.00967554132f, 0.0555071328f, 0.240221197f, 0.693146967f, 1.00000007f})
    y = at::vec::fmadd(y, t, Reals(power));
  return _mm512_scalef_ps(y, whole);
}

inline Reals sigmoid(Reals x) {
  const Reals exponent = x * Reals(-1.44269504f);
  return Reals(1) / (Reals(1) + exp2(_mm512_max_ps(Reals(-126), exponent)));  // NaN stays, infinity does not
}

// In the order of ACTIVATIONS in requantize.py.
template <int activation>
inline Reals activated(Reals x) {
  const Reals half(0.5f), zero(0), six(6);
  if constexpr (activation == 1) return at::vec::maximum(x, zero);
  if constexpr (activation == 2) return at::vec::clamp(x, zero, six);
  if constexpr (activation == 3) return at::vec::fmadd(half * x, NORMAL(x), half * x);
  if constexpr (activation == 4) {
    const Reals y = Reals(0.79788456f) * at::vec::fmadd(Reals(0.044715f) * x * x, x, x);
    return at::vec::fmadd(half * x, TANH(y), half * x);
  }
  if constexpr (activation == 5) return x * sigmoid(x);
  if constexpr (activation == 6) return x * at::vec::clamp(x + Reals(3), zero, six) * Reals(1.0f / 6);
  if constexpr (activation == 7) return TANH(x);
  return x;
}

// The first lanes of a register, as many as are left of something.
inline __mmask16 lanes(int64_t left) { return (1u << std::min(LANES, left)) - 1; }

inline Reals read(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }

inline Reals read(const at::BFloat16* p, __mmask16 some) {
  __m512 y;
  at::vec::cvtbf16_fp32(_mm256_maskz_loadu_epi16(some, p), y);
  return y;
}

inline Reals read(const at::Half* p, __mmask16 some) {
  __m512 y;
  at::vec::cvtfp16_fp32(_mm256_maskz_loadu_epi16(some, p), y);
  return y;
}

// Call a function with a pointer to real values of their type.
template <typename F>
auto typed(const void* reals, at::ScalarType dtype, F function) {
  if (dtype == at::kBFloat16) return function(static_cast<const at::BFloat16*>(reals));
  if (dtype == at::kHalf) return function(static_cast<const at::Half*>(reals));
  return function(static_cast<const float*>(reals));
}

inline void write(float* p, __mmask16 some, Reals y) { _mm512_mask_storeu_ps(p, some, y); }

inline void write(at::BFloat16* p, __mmask16 some, Reals y) {
  _mm256_mask_storeu_epi16(p, some, at::vec::cvtfp32_bf16(y));
}

inline void write(at::Half* p, __mmask16 some, Reals y) {
  _mm256_mask_storeu_epi16(p, some, at::vec::cvtfp32_fp16(y));
}

inline void write(uint8_t* p, __mmask16 some, __m512i codes) {
  _mm_mask_storeu_epi8(p, some, _mm512_cvtepi32_epi8(codes));
}

// Past the caches, to where a line begins, or half of one.
inline void stream(float* p, Reals y) { _mm512_stream_ps(p, y); }

inline void stream(at::BFloat16* p, Reals y) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(y));
}

inline void stream(at::Half* p, Reals y) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_fp16(y));
}

// Whole steps that are no more than `Coded::most` and the zero point make codes: what is less saturates to 0.
inline void write(uint8_t* p, const __m512i (&steps)[4], __m512i zero_point, bool streamed) {
  const __m512i z = _mm512_packs_epi32(zero_point, zero_point);
  const __m512i words = _mm512_adds_epi16(_mm512_packs_epi32(steps[0], steps[1]), z);
  const __m512i more = _mm512_adds_epi16(_mm512_packs_epi32(steps[2], steps[3]), z);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
  if (streamed)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bytes);
  else
    _mm512_storeu_si512(p, bytes);
}

inline __m512i read(const int32_t* p, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, p); }

// Codes from `low` to `high` of real values in steps: what is clamped to whole steps is rounded to them.
struct Coded {
  __m512i zero_point;
  Reals least, most;

  Coded(int32_t zero_point, int64_t low, int64_t high)
      : zero_point(_mm512_set1_epi32(zero_point)),
        least(static_cast<float>(low - zero_point)),
        most(static_cast<float>(high - zero_point)) {}

  __m512i operator()(Reals steps) const {
    const __m512 within = _mm512_max_ps(_mm512_min_ps(steps, most), least);
    return _mm512_add_epi32(_mm512_cvtps_epi32(within), zero_point);
  }
};

// What makes codes of real values with a scale.
auto coder(float scale, int32_t zero_point, int64_t low, int64_t high) {
  return [inverse = Reals(1 / scale), coded = Coded(zero_point, low, high)](Reals x) { return coded(x * inverse); };
}

// A float8 format: bits of its mantissa, the least exponent of a normal number, and the largest value.
struct Float8 {
  int mantissa, least;
  float largest;

  // Real values rounded to those of its codes, to even.
  Reals operator()(Reals x) const {
    x = at::vec::clamp(x, Reals(-largest), Reals(largest));
    const __m512 exponent = _mm512_max_ps(_mm512_getexp_ps(x), Reals(static_cast<float>(least)));
    const Reals shift = Reals(static_cast<float>(mantissa)) - Reals(exponent);
    return _mm512_scalef_ps(Reals(_mm512_scalef_ps(x, shift)).round(), Reals(0) - shift);
  }
};

Float8 float8_of(at::ScalarType format) {
  if (format == at::kFloat8_e4m3fn) return {3, -6, 448};
  if (format == at::kFloat8_e5m2) return {2, -14, 57344};
  if (format == at::kFloat8_e4m3fnuz) return {3, -7, 240};
  TORCH_CHECK(format == at::kFloat8_e5m2fnuz, format, " is no float8 format");
  return {2, -15, 57344};
}

// Codes of float8_e4m3fn, the format of which codes are made in a tile.
inline void write_float8(uint8_t* p, __mmask16 some, Reals x) {
  const Reals y = Float8{3, -6, 448}(x), size = y.abs();
  const __m512i bits = _mm512_castps_si512(size);
  __m512i code = _mm512_sub_epi32(_mm512_srli_epi32(bits, 23 - 3), _mm512_set1_epi32((127 - 7) << 3));
  const __m512i steps = _mm512_cvtps_epi32(size * Reals(512));  // of a number that is not normal
  code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(size, Reals(0x1p-6f), _CMP_LT_OQ), steps);
  code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_castps_si512(y), 31), 7);
  _mm_mask_storeu_epi8(p, some, _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign)));
}

// Where a tile of sums lies in the result.
struct Tile {
  int64_t row, height, column, count;
};

// What makes real values of the sums of 16 columns; what is read for a column stays in registers.
template <typename Sum>
struct Columns {
  Reals scale, bias;
  __m512i offset, zero_point;

  Columns() = default;

  Columns(const Call& call, int64_t at, __mmask16 some) : scale(read(call.scale + at, some)) {
    if (call.bias) bias = typed(call.bias, call.bias_dtype, [&](const auto* from) { return read(from + at, some); });
    if constexpr (std::is_same_v<Sum, int32_t>) {
      offset = read(call.sums + at, some);
      if (call.weight_zero_point) {
        zero_point = read(call.weight_zero_point + at, some);
        const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(call.k));
        offset = _mm512_sub_epi32(offset, _mm512_mullo_epi32(k, zero_point));
      }
      offset = _mm512_mullo_epi32(offset, _mm512_set1_epi32(*call.zero_point));
    }
  }

  Reals real(const Sum* sums, int32_t row_sum, bool biased, bool asymmetric) const {
    Reals x;
    if constexpr (std::is_same_v<Sum, int32_t>) {
      __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(sums), offset);
      if (asymmetric) total = _mm512_sub_epi32(total, _mm512_mullo_epi32(zero_point, _mm512_set1_epi32(row_sum)));
      x = _mm512_cvtepi32_ps(total);
    } else {
      x = Reals::loadu(sums);
    }
    x = x * scale;
    return biased ? x + bias : x;
  }
};

// What is written of all rows of a tile, of `V` times 16 columns: of 64 a row at a time, which is whole lines of memory.
template <int V, int activation, typename Sum, typename Y>
void finish_columns(const Call& call, const Sum* sums, const Tile& tile, const int32_t* row_sums, int64_t from, Y* y) {
  constexpr bool codes = std::is_same_v<Y, uint8_t>, integers = std::is_same_v<Sum, int32_t>;
  const bool biased = call.bias, asymmetric = call.weight_zero_point, streamed = V > 1 && call.streamed;
  const bool added = call.residual, rectified = call.activation == 1;  // after a residual
  const int64_t n = call.n, at = tile.row * n + tile.column + from;
  const __mmask16 some = V > 1 ? 0xffff : lanes(tile.count - from);
  const Reals to_scale(codes ? *call.to_scale : 1), inverse(codes ? 1 / *call.to_scale : 1);
  const Coded coded(codes ? *call.to_zero_point : 0, 0, 255);
  const Y* residual = static_cast<const Y*>(call.residual) + at;
  Columns<Sum> columns[V];
  for (int v = 0; v < V; ++v) columns[v] = Columns<Sum>(call, tile.column + from + v * LANES, some);
  y += at;
  sums += from;
  for (int64_t i = 0; i < tile.height; ++i, y += n, residual += n, sums += COLUMNS) {
    Reals x[V];
    for (int v = 0; v < V; ++v) x[v] = columns[v].real(sums + v * LANES, row_sums[i], biased, asymmetric);
    if constexpr (codes && integers) {
      for (int v = 0; v < V; ++v) x[v] = activated<activation>(x[v]) * inverse;
      if constexpr (V == 4) {
        __m512i steps[V];
        for (int v = 0; v < V; ++v) steps[v] = _mm512_cvtps_epi32(_mm512_min_ps(x[v], coded.most));
        write(y, steps, coded.zero_point, streamed);
      } else {
        write(y, some, coded(x[0]));
      }
    } else {
      for (int v = 0; v < V; ++v) {
        const int64_t j = v * LANES;
        if constexpr (codes) {
          write_float8(y + j, some, activated<activation>(x[v]) / to_scale);
        } else {
          if (added) x[v] = x[v] + read(residual + j, some);
          if (added && rectified) x[v] = activated<1>(x[v]);
          if (streamed)
            stream(y + j, x[v]);
          else
            write(y + j, some, x[v]);
        }
      }
    }
  }
}

template <typename Sum, typename Y, int activation = 0>
void finish(const Call& call, const Sum* sums, const Tile& tile, const int32_t* row_sums) {
  Y* y = static_cast<Y*>(call.y);
  if (tile.count == COLUMNS) return finish_columns<4, activation>(call, sums, tile, row_sums, 0, y);
  for (int64_t j = 0; j < tile.count; j += LANES) finish_columns<1, activation>(call, sums, tile, row_sums, j, y);
}

template <typename Sum>
using Finish = void (*)(const Call&, const Sum*, const Tile&, const int32_t*);

template <typename Sum>
Finish<Sum> finisher(const Call& call) {
  static constexpr Finish<Sum> codes[] = {
      finish<Sum, uint8_t, 0>, finish<Sum, uint8_t, 1>, finish<Sum, uint8_t, 2>, finish<Sum, uint8_t, 3>,
      finish<Sum, uint8_t, 4>, finish<Sum, uint8_t, 5>, finish<Sum, uint8_t, 6>, finish<Sum, uint8_t, 7>};
  if (call.to_scale) return codes[call.activation];
  if (call.dtype == at::kBFloat16) return finish<Sum, at::BFloat16>;
  return call.dtype == at::kHalf ? finish<Sum, at::Half> : finish<Sum, float>;
}

inline int32_t sum(const uint8_t* codes, int64_t count) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    const __mmask64 some = ~uint64_t(0) >> std::max<int64_t>(0, 64 - (count - i));
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(some, codes + i), _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sums));
}

inline int32_t sum(const at::BFloat16*, int64_t) { return 0; }  // float8 has no zero points

// VNNI adds products of unsigned and signed codes.
template <typename Code>
using Factor = std::conditional_t<sizeof(Code) == 1, uint8_t, Code>;

// What gives some rows of the activations: the first of them, how many, and the group.
template <typename Code>
using Rows = std::function<const Factor<Code>*(int64_t, int64_t, int64_t)>;

// Tasks by number, for as many threads: each takes those of its own part in order, so that it writes where it has written
// before, and then what is left of the others', for one may be slower: its core is another process's too.
class Tasks {
  const int64_t count, threads;
  std::vector<std::atomic<int64_t>> next;

 public:
  explicit Tasks(int64_t count)
      : count(count), threads(std::min<int64_t>(count, at::get_num_threads())), next(threads) {
    for (int64_t i = 0; i < threads; ++i) next[i] = count * i / threads;
  }

  // Call `thread` in each of them with a function that calls what it is given with each task.
  template <typename F>
  void share(F thread) {
    at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
      thread([&](auto work) {
        for (int64_t i = own; i < own + threads; ++i)
          for (int64_t part = i % threads, end = count * (part + 1) / threads, task; (task = next[part]++) < end;) work(task);
      });
    });
  }
};

// Each task has some rows, and all or a part of the columns; the rows are alike in number, and so many that every thread
// has as many tasks as the others.
template <typename Code, typename Sum>
void multiply(const Call& call, const Rows<Code>& rows_of) {
  const int64_t each = call.n / call.groups, widths = call.groups * tiles(each);
  const int64_t threads = at::get_num_threads(), fewest = parts(call.m, has_amx() ? ROWS : ROWS / 2);
  const int64_t height = parts(call.m, fewest < threads ? fewest : parts(fewest, threads) * threads);
  const int64_t heights = parts(call.m, height), shares = std::min(widths, parts(8 * threads, heights));
  const int64_t depth = inner<Code>(call.k), size = COLUMNS * depth;
  const Finish<Sum> finish = finisher<Sum>(call);
  Tasks(heights * shares).share([&](auto each_task) {
    alignas(LINE) Sum sums[ROWS * COLUMNS];
    int32_t row_sums[ROWS] = {};
    const Factor<Code>* rows = nullptr;
    int64_t last = -1, last_row = -1;
    each_task([&](int64_t task) {
      const int64_t row = task / shares * height, share = task % shares;
      Tile tile{.row = row, .height = std::min(height, call.m - row)};
      for (int64_t j = widths * share / shares; j < widths * (share + 1) / shares; ++j) {
        const int64_t group = j / tiles(each), column = j % tiles(each) * COLUMNS;
        tile.column = group * each + column;
        tile.count = std::min(COLUMNS, each - column);
        if (group != last || row != last_row) {
          rows = rows_of(row, tile.height, group);
          if (call.weight_zero_point)
            for (int64_t i = 0; i < tile.height; ++i)
              row_sums[i] = sum(rows + i * depth, depth);
          last = group;
          last_row = row;
        }
        const Code* weight = static_cast<const Code*>(call.packed) + j * size;
        for (int64_t k = 0; k < depth; k += DEPTH)
          brgemm(
              tile.height, parts(tile.count, LANES) * LANES, std::min(DEPTH, depth - k), depth, COLUMNS, COLUMNS, k > 0,
              rows + k, weight + k * COLUMNS, sums);
        finish(call, sums, tile, row_sums);
      }
    });
    at::native::cpublas::brgemm_release();
    _mm_sfence();
  });
}

// Of codes where K needs no zeros behind it.
Rows<int8_t> where_they_lie(const Call& call) {
  return [q = static_cast<const uint8_t*>(call.q), k = call.k](int64_t first, int64_t, int64_t) { return q + first * k; };
}

// Memory for some rows, of each thread.
template <typename Code>
Code* scratch(int64_t size) {
  static thread_local std::vector<Code> memory;
  memory.resize(std::max<size_t>(memory.size(), size + 2 * LINE));
  void* begin = memory.data();
  size_t space = memory.size() * sizeof(Code);
  return static_cast<Code*>(std::align(LINE, size, begin, space));
}

// Of rows that are made, each by `make` of where it begins in `X`, and followed by zeros.
template <typename Code, typename X, typename Make>
Rows<Code> made(const Call& call, Make make) {
  return [=, q = static_cast<const X*>(call.q), k = call.k](int64_t first, int64_t height, int64_t) {
    const int64_t depth = inner<Code>(k);
    Factor<Code>* rows = scratch<Factor<Code>>(ROWS * depth);
    for (int64_t i = 0; i < height; ++i) {
      make(q + (first + i) * k, k, rows + i * depth);
      std::fill(rows + i * depth + k, rows + (i + 1) * depth, Factor<Code>(0));
    }
    return rows;
  };
}

// Write what `code` makes of real values, 16 at a time.
template <typename X, typename Y, typename F>
void each(const X* from, int64_t count, Y* to, F code) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 some = lanes(count - i);
    write(to + i, some, code(read(from + i, some)));
  }
}

// Of real values, which `code` makes codes, or their values.
template <typename Code, typename F>
Rows<Code> coded(const Call& call, at::ScalarType of, F code) {
  return typed(call.q, of, [&]<typename X>(const X*) {
    return made<Code, X>(
        call, [code](const X* from, int64_t count, Factor<Code>* to) { each(from, count, to, code); });
  });
}

// As std::copy_n, which calls a function: a few bytes at a time are most of the time of an image of three channels. The
// last 64 bytes are written whole: there is room for them behind the last row of `scratch`.
constexpr auto copy = [](const uint8_t* from, int64_t count, uint8_t* to) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i == count) return;
  const __mmask64 some = ~uint64_t(0) >> (64 - (count - i));
  _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi8(some, from + i));
};

// Of four registers, the first quarters become the first one, and so on.
inline void transpose(__m512i (&x)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88), x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88), x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// In each quarter of four registers, rows of four become columns.
inline void transpose_quarters(__m512i (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}

// What `code` makes of images (batch, channels, pixels), in the order (batch, pixels, channels).
template <typename X, typename F>
void code_images(const X* images, int64_t batch, int64_t channels, int64_t pixels, uint8_t* to, F code) {
  const int64_t blocks = parts(pixels, COLUMNS);
  at::parallel_for(0, batch * blocks, parts(1 << 15, COLUMNS * channels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, left = block % blocks * COLUMNS, right = std::min(pixels, left + COLUMNS);
      for (int64_t c = 0; c < channels; c += LANES)
        for (int64_t i = left; i < right; i += LANES) {
          const X* from = images + (image * channels + c) * pixels + i;
          __m512i x[4] = {};  // of 16 pixels, four channels in 32 bits
          for (int64_t j = 0; j < std::min(LANES, channels - c); ++j) {
            const __m512i codes = code(read(from + j * pixels, lanes(pixels - i)));
            x[j / 4] = _mm512_or_si512(x[j / 4], _mm512_sll_epi32(codes, _mm_cvtsi32_si128(j % 4 * 8)));
          }
          transpose_quarters(x);
          alignas(LINE) uint8_t rows[4][4][LANES];
          for (int64_t k = 0; k < 4; ++k) _mm512_store_si512(rows[k], x[k]);
          for (int64_t j = 0; j < std::min(LANES, pixels - i); ++j)
            _mm_mask_storeu_epi8(
                to + (image * pixels + i + j) * channels + c, lanes(channels - c),
                _mm_load_si128(reinterpret_cast<const __m128i*>(rows[j % 4][j / 4])));
        }
    }
  });
}

template <typename Y>
__m512i read_bits(const Y* p, __mmask16 some) {
  if constexpr (sizeof(Y) == 4)
    return _mm512_maskz_loadu_epi32(some, p);
  else
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
}

template <typename Y>
void write_bits(Y* p, __mmask16 some, __m512i x) {
  if constexpr (sizeof(Y) == 4)
    _mm512_mask_storeu_epi32(p, some, x);
  else
    _mm256_mask_storeu_epi16(p, some, _mm512_cvtepi32_epi16(x));
}

// Images (batch, pixels, channels) in the order (batch, channels, pixels).
template <typename Y>
void exchange(const Y* images, int64_t batch, int64_t channels, int64_t pixels, Y* to) {
  const int64_t blocks = parts(channels, LANES), shares = parts(pixels, ROWS);
  at::parallel_for(0, batch * blocks * shares, parts(1 << 15, LANES * ROWS), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / shares / blocks, c = task / shares % blocks * LANES;
      const int64_t left = task % shares * ROWS, right = std::min(pixels, left + ROWS);
      for (int64_t i = left; i < right; i += LANES) {
        __m512i x[4][4] = {}, y[4];
        for (int64_t j = 0; j < std::min(LANES, pixels - i); ++j)
          x[j / 4][j % 4] = read_bits(images + (image * pixels + i + j) * channels + c, lanes(channels - c));
        for (auto& four : x) transpose_quarters(four);
        for (int64_t k = 0; k < 4; ++k) {
          for (int64_t j = 0; j < 4; ++j) y[j] = x[j][k];
          transpose(y);
          for (int64_t j = k; j < std::min(LANES, channels - c); j += 4)
            write_bits(to + (image * channels + c + j) * pixels + i, lanes(pixels - i), y[j / 4]);
        }
      }
    }
  });
}

// What a convolution takes: of images (batch, depth, height, width, channels) in memory.
struct Geometry {
  int64_t size[3], channels;
  int64_t kernel[3], stride[3], dilation[3], before[3];
  int64_t windows[3];  // of an image

  int64_t plane() const { return size[1] * size[2] * channels; }
};

// Where a window begins, and the image that it is in; from one window to the next.
class Window {
  const Geometry& of;
  int64_t at[3];

 public:
  const uint8_t* image;

  Window(const Geometry& of, const void* images, int64_t first) : of(of) {
    for (int axis = 2; axis >= 0; --axis) {
      at[axis] = first % of.windows[axis];
      first /= of.windows[axis];
    }
    image = static_cast<const uint8_t*>(images) + first * of.size[0] * of.plane();
  }

  int64_t begin(int axis) const { return at[axis] * of.stride[axis] - of.before[axis]; }

  void next() {
    for (int axis = 2; axis >= 0; --axis) {
      if (++at[axis] < of.windows[axis]) return;
      at[axis] = 0;
    }
    image += of.size[0] * of.plane();
  }
};

// Of windows of images, (taps, channels of the group), by `take` of codes; where there is no pixel, what `outside` is.
template <typename Code, typename Take>
Rows<Code> gathered(const Call& call, const Geometry& of, Factor<Code> outside, Take take) {
  return [=, q = static_cast<const uint8_t*>(call.q)](int64_t first, int64_t height, int64_t group) {
    const int64_t depth = inner<Code>(call.k), channels = of.channels / call.groups;
    const int64_t step = of.dilation[2] * of.channels, along = of.kernel[2], line = of.size[2] * of.channels;
    Factor<Code>* rows = scratch<Factor<Code>>(ROWS * depth);
    Window window(of, q, first);
    for (int64_t i = 0; i < height; ++i, window.next()) {
      const int64_t front = window.begin(0), top = window.begin(1), left = window.begin(2);
      const bool whole = 0 <= left && left + (along - 1) * of.dilation[2] < of.size[2];
      Factor<Code>* to = rows + i * depth;
      for (int64_t c = 0, z = front; c < of.kernel[0]; ++c, z += of.dilation[0])
        for (int64_t a = 0, y = top; a < of.kernel[1]; ++a, y += of.dilation[1]) {
          const uint8_t* from = window.image + z * of.plane() + y * line + left * of.channels + group * channels;
          const bool inside = 0 <= z && z < of.size[0] && 0 <= y && y < of.size[1];
          if (inside && whole && step == channels) {  // pixels that lie side by side
            take(from, along * channels, to);
            to += along * channels;
            continue;
          }
          for (int64_t b = 0; b < along; ++b, from += step, to += channels) {
            const int64_t x = left + b * of.dilation[2];
            if (inside && 0 <= x && x < of.size[2])
              take(from, channels, to);
            else
              std::fill_n(to, channels, outside);
          }
        }
      std::fill(to, rows + (i + 1) * depth, Factor<Code>(0));
    }
    return rows;
  };
}

constexpr int64_t BLOCK = 4 * COLUMNS;  // four elements of a window, of 64 channels

// (N, taps) -> (N / COLUMNS, taps / 4, 4, 4, 4, 4), filled up with zeros, in the order in which `convolve_alone` has codes.
void pack_alone(const int8_t* codes, int64_t n, int64_t taps, int8_t* packed) {
  const int64_t size = parts(taps, 4) * BLOCK;
  std::fill_n(packed, tiles(n) * size, int8_t(0));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t place = j % 16 / 4 * COLUMNS + j % COLUMNS / 16 * 16 + j % 4 * 4 + tap % 4;
      packed[j / COLUMNS * size + tap / 4 * BLOCK + place] = codes[j * taps + tap];
    }
}

// What is read of a window: where its elements lie from the first one on, and which of them count, 4 in 32 bits.
struct Elements {
  std::vector<int64_t> places;
  std::vector<int32_t> ones;

  explicit Elements(int64_t taps) : places(parts(taps, 4) * 4), ones(parts(taps, 4), 0x01010101) {
    if (taps % 4) ones.back() >>= (4 - taps % 4) * 8;
  }
};

// The sums of a window of each of 64 channels, or of `some`: of four elements at a time.
template <bool asymmetric, int64_t BLOCKS>
void sum_window(
    intptr_t first, const Elements& of, const int8_t* weight, const __m512i* zero_points, __mmask64 some, int32_t* to) {
  const int64_t blocks = BLOCKS ? BLOCKS : of.ones.size();
  const int64_t* place = of.places.data();
  __m512i total[4] = {}, plain[4] = {};
  for (int64_t block = 0; block < blocks; ++block, place += 4, weight += BLOCK) {
    __m512i q[4];
    for (int64_t t = 0; t < 4; ++t) q[t] = _mm512_maskz_loadu_epi8(some, reinterpret_cast<void*>(first + place[t]));
    const __m512i low = _mm512_unpacklo_epi8(q[0], q[1]), high = _mm512_unpackhi_epi8(q[0], q[1]);
    const __m512i low2 = _mm512_unpacklo_epi8(q[2], q[3]), high2 = _mm512_unpackhi_epi8(q[2], q[3]);
    q[0] = _mm512_unpacklo_epi16(low, low2), q[1] = _mm512_unpackhi_epi16(low, low2);
    q[2] = _mm512_unpacklo_epi16(high, high2), q[3] = _mm512_unpackhi_epi16(high, high2);
    for (int64_t v = 0; v < 4; ++v) {
      total[v] = _mm512_dpbusd_epi32(total[v], q[v], _mm512_loadu_si512(weight + v * COLUMNS));
      if (asymmetric) plain[v] = _mm512_dpbusd_epi32(plain[v], q[v], _mm512_set1_epi32(of.ones[block]));
    }
  }
  transpose(total);
  if (asymmetric) transpose(plain);
  for (int64_t v = 0; v < 4; ++v) {
    if (asymmetric) total[v] = _mm512_sub_epi32(total[v], _mm512_mullo_epi32(plain[v], zero_points[v]));
    _mm512_store_si512(to + v * LANES, total[v]);
  }
}

// A convolution of each channel alone.
template <bool asymmetric>
void convolve_alone(const Call& call, const Geometry& of) {
  const int64_t widths = tiles(call.n), blocks = parts(call.k, 4);
  const int64_t most = std::max(parts(call.m, ROWS / 4), parts(8 * at::get_num_threads(), widths));
  const int64_t height = parts(call.m, most), heights = parts(call.m, height);
  const Finish<int32_t> finish = finisher<int32_t>(call);
  const auto sum = blocks == 3 ? sum_window<asymmetric, 3> : sum_window<asymmetric, 0>;  // 3 x 3 elements
  // Call a function with each element of a window, and where it is from the first one on.
  const auto elements = [&](auto use) {
    int64_t tap = 0;
    for (int64_t c = 0; c < of.kernel[0]; ++c)
      for (int64_t a = 0; a < of.kernel[1]; ++a)
        for (int64_t b = 0; b < of.kernel[2]; ++b)
          use(tap++, c * of.dilation[0], a * of.dilation[1], b * of.dilation[2]);
  };
  Elements inside(call.k);
  elements([&](int64_t tap, int64_t z, int64_t y, int64_t x) {
    inside.places[tap] = z * of.plane() + (y * of.size[2] + x) * of.channels;
  });
  Tasks(heights * widths).share([&](auto each_task) {
    alignas(LINE) int32_t sums[ROWS / 4 * COLUMNS];
    alignas(LINE) uint8_t outside[COLUMNS];
    const int32_t row_sums[ROWS / 4] = {};  // those of a window are subtracted here, as each channel has its own
    std::fill_n(outside, COLUMNS, static_cast<uint8_t>(*call.zero_point));
    Elements bordering(call.k);
    each_task([&](int64_t task) {
      const int64_t column = task % widths * COLUMNS, row = task / widths * height;
      const Tile tile{row, std::min(height, call.m - row), column, std::min(COLUMNS, call.n - column)};
      const __mmask64 some = ~uint64_t(0) >> (COLUMNS - tile.count);
      const int8_t* weight = static_cast<const int8_t*>(call.packed) + column / COLUMNS * blocks * BLOCK;
      __m512i zero_points[4];
      for (int64_t v = 0; v < 4 && asymmetric; ++v)
        zero_points[v] = read(call.weight_zero_point + column + v * LANES, some >> v * LANES);
      Window window(of, call.q, row);
      for (int64_t i = 0; i < tile.height; ++i, window.next()) {
        const int64_t begin[3] = {window.begin(0), window.begin(1), window.begin(2)};
        const intptr_t first = reinterpret_cast<intptr_t>(window.image) + begin[0] * of.plane() +
                               (begin[1] * of.size[2] + begin[2]) * of.channels + column;
        const auto within = [&](int axis, int64_t place) { return 0 <= place && place < of.size[axis]; };
        bool whole = true;
        for (int axis = 0; axis < 3; ++axis)
          whole &= begin[axis] >= 0 && within(axis, begin[axis] + (of.kernel[axis] - 1) * of.dilation[axis]);
        if (!whole) {
          std::fill(bordering.places.begin(), bordering.places.end(), reinterpret_cast<intptr_t>(outside) - first);
          elements([&](int64_t tap, int64_t z, int64_t y, int64_t x) {
            if (within(0, begin[0] + z) && within(1, begin[1] + y) && within(2, begin[2] + x))
              bordering.places[tap] = inside.places[tap];
          });
        }
        sum(first, whole ? inside : bordering, weight, zero_points, some, sums + i * COLUMNS);
      }
      finish(call, sums, tile, row_sums);
    });
    _mm_sfence();
  });
}

// The bfloat16 value of each of the 256 codes of a float8 format.
const at::BFloat16* values_of(at::ScalarType format) {
  static std::mutex mutex;
  static std::map<at::ScalarType, at::Tensor> known;
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& values = known[format];
  if (!values.defined()) values = at::arange(256, at::kByte).view(format).to(at::kBFloat16);
  return values.const_data_ptr<at::BFloat16>();
}

// The values of float8 codes, looked up in registers.
inline void decode(const at::BFloat16* values, const uint8_t* codes, int64_t count, at::BFloat16* to) {
  const __m512i t0 = _mm512_loadu_si512(values), t1 = _mm512_loadu_si512(values + 32);
  const __m512i t2 = _mm512_loadu_si512(values + 64), t3 = _mm512_loadu_si512(values + 96);
  const __m512i sign = _mm512_set1_epi16(128), minus_zero = _mm512_set1_epi16(values[128].x);  // or NaN
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 some = ~uint32_t(0) >> std::max<int64_t>(0, 32 - (count - i));
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, codes + i));
    const __m512i low = _mm512_permutex2var_epi16(t0, code, t1), high = _mm512_permutex2var_epi16(t2, code, t3);
    __m512i value = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), low, high);
    value = _mm512_or_si512(value, _mm512_slli_epi16(_mm512_and_si512(code, sign), 8));
    value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(code, sign), minus_zero);
    _mm512_mask_storeu_epi16(to + i, some, value);
  }
}

// A packed weight.
struct Packed {
  const c10::TensorImpl* owner;  // of two tensors that share it, one may have been written to
  const void* memory;
  std::vector<int64_t> sizes, strides;
  int64_t groups, depth = 0;  // K
  uint32_t version = 0;
  bool alone = false;  // each channel
  at::Tensor copy;  // of codes in inference mode, which have no version
  at::Tensor weight, sums;  // no sums of float8

  Packed(const at::Tensor& codes, int64_t groups)
      : owner(codes.unsafeGetTensorImpl()),
        memory(codes.const_data_ptr()),
        sizes(codes.sizes().vec()),
        strides(codes.strides().vec()),
        groups(groups) {
    TORCH_CHECK(
        codes.numel() > 0 && (codes.scalar_type() == at::kChar || (codes.is_floating_point() && codes.element_size() == 1)),
        "a weight of ", codes.scalar_type(), " and shape ", codes.sizes(), "; give codes of int8 or float8, at least one");
    if (codes.is_inference())
      copy = codes.clone(at::MemoryFormat::Contiguous);
    else
      version = codes._version();
    // A window has the channels of a pixel side by side.
    const at::Tensor rows = codes.movedim(1, -1).contiguous().flatten(1);
    const int64_t n = rows.size(0), k = depth = rows.size(1), width = groups * tiles(n / groups) * COLUMNS;
    const uint8_t* from = static_cast<const uint8_t*>(rows.const_data_ptr());
    if (codes.is_floating_point()) {
      const at::BFloat16* value = values_of(codes.scalar_type());
      weight = at::empty({width, inner<at::BFloat16>(k)}, at::kBFloat16);
      pack(from, n, k, groups, weight.data_ptr<at::BFloat16>(), [=](uint8_t code) { return value[code]; });
    } else if (sums = rows.sum(1, false, at::kInt); groups == n && n > 1 && codes.size(1) == 1) {
      alone = true;
      weight = at::empty({tiles(n), parts(k, 4) * BLOCK}, at::kChar);
      pack_alone(reinterpret_cast<const int8_t*>(from), n, k, weight.data_ptr<int8_t>());
    } else {
      weight = at::empty({width, inner<int8_t>(k)}, at::kChar);
      pack(from, n, k, groups, weight.data_ptr<int8_t>(), [](uint8_t code) { return static_cast<int8_t>(code); });
    }
  }

  bool is_of(const at::Tensor& codes, int64_t in_groups) const {
    if (owner != codes.unsafeGetTensorImpl() || memory != codes.const_data_ptr() || groups != in_groups) return false;
    if (codes.sizes() != at::IntArrayRef(sizes) || codes.strides() != at::IntArrayRef(strides)) return false;
    if (!codes.is_inference()) return version == codes._version();
    const at::Tensor now = codes.contiguous();
    return copy.defined() && std::memcmp(copy.const_data_ptr(), now.const_data_ptr(), now.nbytes()) == 0;
  }
};

// What keeps it, for as long as the tensor of its codes lives. A tensor gets one once, as torch reads the pointer to it
// without a lock where it makes an alias, which begins with none.
struct Kept : c10::BackendMeta {
  std::shared_ptr<Packed> weight;
  c10::intrusive_ptr<c10::BackendMeta> clone(const c10::intrusive_ptr<c10::BackendMeta>&) const override { return {}; }
};

std::shared_ptr<Packed> packed(const at::Tensor& codes, int64_t groups) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  c10::TensorImpl* impl = codes.unsafeGetTensorImpl();
  auto* kept = dynamic_cast<Kept*>(impl->get_backend_meta());
  if (kept && kept->weight->is_of(codes, groups)) return kept->weight;
  const c10::InferenceMode outside(false);  // what is kept serves calls outside of it too
  const auto made = std::make_shared<Packed>(codes, groups);
  if (!kept) {
    auto keeper = c10::make_intrusive<Kept>();
    kept = keeper.get();
    impl->set_backend_meta(std::move(keeper));
  }
  kept->weight = made;
  return made;
}

int64_t place(std::string_view activation) {
  static constexpr std::string_view names[] = {"none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "tanh"};
  const auto* found = std::find(std::begin(names), std::end(names), activation);
  TORCH_CHECK(found != std::end(names), "no such activation: ", activation);
  return found - std::begin(names);
}

// What operands are read of: contiguous, and held until the call is over; no memory but theirs.
struct Held {
  std::vector<at::Tensor> tensors;

  Held() { tensors.reserve(9); }  // else a small product takes 5 % longer

  template <typename T = void>
  const T* at(const char* name, const std::optional<at::Tensor>& x, int64_t count, at::ScalarType dtype) {
    if (!x) return nullptr;
    TORCH_CHECK(
        x->numel() == count && x->scalar_type() == dtype && x->is_cpu(), name, " has ", x->numel(), " elements of ",
        x->scalar_type(), " on ", x->device(), "; give ", count, " of ", dtype, " on the CPU");
    return static_cast<const T*>(tensors.emplace_back(x->contiguous()).const_data_ptr());
  }
};

struct Operands {
  const std::optional<at::Tensor>&q_scale, &zero_point, &weight_zero_point, &bias, &residual, &to_scale, &to_zero_point;
  const at::Tensor& scale;
};

bool is_real(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

// Which codes are made of a result.
at::ScalarType codes_dtype(const at::Tensor& weight) {
  return weight.is_floating_point() ? at::kFloat8_e4m3fn : at::kByte;
}

// Whether the lines of a result are better not read before they are written: where it is too large for the caches, and
// not so large that glibc takes new pages for it, which the kernel has just filled with zeros.
bool is_streamed(const at::Tensor& y, int64_t groups) {
  const size_t begin = reinterpret_cast<size_t>(y.const_data_ptr()), row = y.size(-1) / groups * y.element_size();
  return STREAMED <= y.nbytes() && y.nbytes() < NEW && (begin | row) % LINE == 0;
}

// Return the call that writes to `y`, `(..., N)`.
Call call_of(
    const at::Tensor& q, const Packed& weight, const Operands& operands, std::string_view activation,
    const at::Tensor& y, Held& held) {
  const auto& bias = operands.bias;
  const int64_t n = y.size(-1);
  const at::ScalarType dtype = y.scalar_type();
  const bool floats = !weight.sums.defined(), codes = operands.to_scale.has_value();
  const bool converts = bias && !is_real(bias->scalar_type());
  const at::ScalarType bias_dtype = bias && !converts ? bias->scalar_type() : at::kFloat;
  TORCH_CHECK(codes == operands.to_zero_point.has_value(), "give to_scale and to_zero_point, or neither");
  TORCH_CHECK(floats || operands.zero_point, "integers have a zero point; give one");
  const at::ScalarType read = q.scalar_type();
  TORCH_CHECK(!operands.q_scale || is_real(read), "real values are made codes of, not ", read);
  TORCH_CHECK(
      operands.q_scale || (floats ? q.is_floating_point() && q.element_size() == 1 : read == at::kByte), "a weight of ",
      floats ? "float8" : "integers", " meets codes of ", read);
  TORCH_CHECK(codes || is_real(dtype), "the result is ", dtype, "; ask for float32, bfloat16 or float16");
  return {
      .m = y.numel() / n,
      .n = n,
      .k = weight.depth,
      .groups = weight.groups,
      .activation = place(activation),
      .dtype = dtype,
      .q = held.at("q", q, q.numel(), read),
      .q_scale = held.at<float>("q_scale", operands.q_scale, 1, at::kFloat),
      .packed = weight.weight.const_data_ptr(),
      .sums = floats ? nullptr : weight.sums.const_data_ptr<int32_t>(),
      .zero_point = held.at<int32_t>("zero_point", operands.zero_point, 1, at::kInt),
      .weight_zero_point = held.at<int32_t>("weight_zero_point", operands.weight_zero_point, n, at::kInt),
      .scale = held.at<float>("scale", operands.scale, n, at::kFloat),
      .bias = held.at("bias", converts ? bias->to(at::kFloat) : bias, n, bias_dtype),
      .bias_dtype = bias_dtype,
      .residual = held.at("residual", operands.residual, y.numel(), dtype),
      .to_scale = held.at<float>("to_scale", operands.to_scale, 1, at::kFloat),
      .to_zero_point = held.at<int32_t>("to_zero_point", operands.to_zero_point, 1, at::kInt),
      .y = y.data_ptr(),
      .streamed = is_streamed(y, weight.alone ? 1 : weight.groups)};
}

// oneDNN on, as for its other quantized operators: who turned it off means float ones, and brgemm would raise. The first
// of the calls that run at a time turns it on, and the last one off again.
class Enabled {
  static inline std::mutex mutex;
  static inline int64_t calls = 0;
  static inline bool before = true;

 public:
  Enabled() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (calls++ == 0) before = at::globalContext().userEnabledMkldnn();
    if (!before) at::globalContext().setUserEnabledMkldnn(true);
  }
  ~Enabled() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--calls == 0 && !before) at::globalContext().setUserEnabledMkldnn(false);
  }
};

// What takes float8 codes as their values.
auto decoder(at::ScalarType format) {
  return [values = values_of(format)](const uint8_t* q, int64_t count, at::BFloat16* to) { decode(values, q, count, to); };
}

// Of codes, or of real values in steps of a scale.
Rows<int8_t> integer_rows(const Call& call, at::ScalarType dtype) {
  if (call.q_scale)
    return coded<int8_t>(call, dtype, coder(*call.q_scale, *call.zero_point, 0, 255));
  if (call.k == inner<int8_t>(call.k)) return where_they_lie(call);
  return made<int8_t, uint8_t>(call, copy);
}

// Of codes, whose format may be another one than the weight's, or of real values that are made codes of a format.
Rows<at::BFloat16> float8_rows(const Call& call, at::ScalarType dtype, std::optional<at::ScalarType> format) {
  if (call.q_scale) {
    TORCH_CHECK(format, "real values are made codes of a float8 format; give one");
    return coded<at::BFloat16>(
        call, dtype, [to = float8_of(*format), scale = Reals(*call.q_scale)](Reals x) { return to(x / scale); });
  }
  return made<at::BFloat16, uint8_t>(call, decoder(dtype));
}

// Of codes, or of real values that are made codes of `format`; the zero point is that of such codes.
at::Tensor multiplied(
    const at::Tensor& q, const std::optional<at::ScalarType> format, const at::Tensor& codes, const Operands& operands,
    std::string_view activation, at::ScalarType dtype) {
  TORCH_CHECK(
      q.dim() > 0 && codes.dim() == 2 && q.size(-1) == codes.size(1), "q of shape ", q.sizes(), " meets codes of shape ",
      codes.sizes(), "; the last axes must be equal");
  std::vector<int64_t> shape = q.sizes().vec();
  shape.back() = codes.size(0);
  const at::Tensor y = at::empty(shape, q.options().dtype(operands.to_scale ? codes_dtype(codes) : dtype));
  if (y.numel() == 0) return y;
  const Enabled enabled;
  const auto weight = packed(codes, 1);
  Held held;
  Call call = call_of(q, *weight, operands, activation, y, held);
  const int32_t shifted = call.zero_point && format == at::kChar ? *call.zero_point + 128 : 0;
  if (format == at::kChar) call.zero_point = &shifted;  // codes of uint8 are multiplied
  if (codes.is_floating_point())
    multiply<at::BFloat16, float>(call, float8_rows(call, q.scalar_type(), format));
  else
    multiply<int8_t, int32_t>(call, integer_rows(call, q.scalar_type()));
  return y;
}

at::Tensor product(
    const at::Tensor& q,
    const std::optional<at::Tensor>& zero_point,
    const at::Tensor& codes,
    const std::optional<at::Tensor>& weight_zero_point,
    const at::Tensor& scale,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual,
    std::string_view activation,
    const std::optional<at::Tensor>& to_scale,
    const std::optional<at::Tensor>& to_zero_point,
    at::ScalarType dtype,
    const std::optional<at::Tensor>& q_scale,
    const std::optional<at::ScalarType> format) {
  const Operands operands{q_scale, zero_point, weight_zero_point, bias, residual, to_scale, to_zero_point, scale};
  return multiplied(q, format, codes, operands, activation, dtype);
}

at::Tensor product_of_reals(
    const at::Tensor& x,
    const at::Tensor& x_scale,
    at::ScalarType format,
    const at::Tensor& zero_point,
    const at::Tensor& codes,
    const std::optional<at::Tensor>& weight_zero_point,
    const at::Tensor& scale,
    const std::optional<at::Tensor>& bias) {
  const Operands operands{x_scale, zero_point, weight_zero_point, bias, {}, {}, {}, scale};
  return multiplied(x, format, codes, operands, "none", x.scalar_type());
}

at::Tensor convolution(
    const at::Tensor& q,
    const std::optional<at::Tensor>& zero_point,
    const at::Tensor& codes,
    const std::optional<at::Tensor>& weight_zero_point,
    const at::Tensor& scale,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    std::string_view activation,
    const std::optional<at::Tensor>& to_scale,
    const std::optional<at::Tensor>& to_zero_point,
    at::ScalarType dtype,
    const std::optional<at::Tensor>& q_scale,
    const std::optional<at::ScalarType> format) {
  const int64_t rank = q.dim() - 2, taps = codes.dim() - 2;  // of one dimension a weight has that alone
  TORCH_CHECK(
      groups > 0 && (rank == 2 || rank == 3) && (taps == rank || (taps == 1 && rank == 2)) &&
          q.size(1) == codes.size(1) * groups && codes.size(0) % groups == 0,
      "q of shape ", q.sizes(), " meets codes of shape ", codes.sizes(), " in ", groups, " groups");
  const auto are = [](at::IntArrayRef numbers, int64_t count, int64_t least) {
    return static_cast<int64_t>(numbers.size()) == count && *std::min_element(numbers.begin(), numbers.end()) >= least;
  };
  TORCH_CHECK(
      are(stride, rank, 1) && are(padding, 2 * rank, 0) && are(dilation, rank, 1), "stride ", stride, ", padding ", padding,
      ", dilation ", dilation, "; give ", rank, ", ", 2 * rank, " and ", rank, " numbers, strides and dilations from 1");
  const at::Tensor images = q.movedim(1, -1).contiguous();
  Geometry of{
      .size = {1, 1, 1},
      .channels = images.size(-1),
      .kernel = {1, 1, 1},
      .stride = {1, 1, 1},
      .dilation = {1, 1, 1},
      .before = {},
      .windows = {1, 1, 1}};
  std::vector<int64_t> shape{images.size(0)};
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t axis = 3 - rank + i, tap = taps - rank + i;
    of.size[axis] = images.size(1 + i);
    of.kernel[axis] = tap < 0 ? 1 : codes.size(2 + tap);
    of.stride[axis] = stride[i];
    of.dilation[axis] = dilation[i];
    of.before[axis] = padding[2 * i];
    const int64_t size = of.size[axis] + padding[2 * i] + padding[2 * i + 1];
    of.windows[axis] = (size - dilation[i] * (of.kernel[axis] - 1) - 1) / stride[i] + 1;
    shape.push_back(of.windows[axis]);
  }
  shape.push_back(codes.size(0));
  const at::Tensor y = at::empty(shape, q.options().dtype(to_scale ? codes_dtype(codes) : dtype));
  const at::Tensor result = y.movedim(-1, 1);
  if (y.numel() == 0) return result;
  const Enabled enabled;
  const auto weight = packed(codes, groups);
  const std::optional<at::Tensor> last = residual ? std::optional(residual->movedim(1, -1)) : std::nullopt;
  const Operands operands{q_scale, zero_point, weight_zero_point, bias, last, to_scale, to_zero_point, scale};
  Held held;
  const Call call = call_of(images, *weight, operands, activation, y, held);
  const bool padded = std::any_of(padding.begin(), padding.end(), [](int64_t size) { return size != 0; });
  const bool one = std::all_of(stride.begin(), stride.end(), [](int64_t step) { return step == 1; });
  const bool rows = one && of.kernel[0] * of.kernel[1] * of.kernel[2] * groups == 1 && !padded;
  TORCH_CHECK(rows || !q_scale, "real values are read by a convolution of one element, not in windows; give codes");
  const at::ScalarType read = q.scalar_type();
  if (weight->alone)
    weight_zero_point ? convolve_alone<true>(call, of) : convolve_alone<false>(call, of);
  else if (codes.is_floating_point())
    multiply<at::BFloat16, float>(
        call, rows ? float8_rows(call, read, format) : gathered<at::BFloat16>(call, of, 0, decoder(read)));
  else
    multiply<int8_t, int32_t>(
        call, rows ? integer_rows(call, read) : gathered<int8_t>(call, of, *call.zero_point, copy));
  return result;
}

// With a scale and a zero point of one element each.
auto coder_of(const at::Tensor& scale, const at::Tensor& zero_point, int64_t low, int64_t high) {
  Held held;
  return coder(
      *held.at<float>("scale", scale, 1, at::kFloat), *held.at<int32_t>("zero_point", zero_point, 1, at::kInt), low, high);
}

at::Tensor quantize(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t low, int64_t high,
    at::ScalarType storage) {
  TORCH_CHECK(is_real(x.scalar_type()), "real values are made codes of, not ", x.scalar_type());
  TORCH_CHECK(storage == at::kByte || storage == at::kChar, "codes of ", storage, " are none of 8 bits");
  const auto code = coder_of(scale, zero_point, low, high);
  const at::Tensor dense = x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
  const at::Tensor y = at::empty_like(x, x.options().dtype(storage));  // as it lies in memory
  typed(dense.const_data_ptr(), x.scalar_type(), [&](const auto* from) {
    uint8_t* to = static_cast<uint8_t*>(y.data_ptr());
    at::parallel_for(0, y.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      each(from + begin, end - begin, to + begin, code);
    });
  });
  return y;
}

// Of real values (batch, channels, ...) in that order, codes with the channels last in memory.
at::Tensor coded_images(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point) {
  std::vector<int64_t> shape = x.movedim(1, -1).sizes().vec();
  const at::Tensor y = at::empty(shape, x.options().dtype(at::kByte));
  const auto code = coder_of(scale, zero_point, 0, 255);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = y.numel() / std::max<int64_t>(1, batch * channels);
  typed(x.const_data_ptr(), x.scalar_type(), [&](const auto* from) {
    code_images(from, batch, channels, pixels, y.data_ptr<uint8_t>(), code);
  });
  return y.movedim(-1, 1);
}

// Images (batch, channels, ...), with the channels last in memory, in the order of their axes.
at::Tensor in_order(const at::Tensor& images) {
  TORCH_CHECK(
      is_real(images.scalar_type()) && images.movedim(1, -1).is_contiguous(), "images of ", images.scalar_type(),
      " with strides ", images.strides(), "; give real values with the channels last in memory");
  const at::Tensor y = at::empty(images.sizes(), images.options());
  const int64_t batch = y.size(0), channels = y.size(1), pixels = y.numel() / std::max<int64_t>(1, batch * channels);
  typed(images.const_data_ptr(), images.scalar_type(), [&]<typename Y>(const Y* from) {
    exchange(from, batch, channels, pixels, static_cast<Y*>(y.data_ptr()));
  });
  return y;
}

at::Tensor convolution_of_reals(
    const at::Tensor& x,
    const at::Tensor& x_scale,
    at::ScalarType format,
    const at::Tensor& zero_point,
    const at::Tensor& codes,
    const std::optional<at::Tensor>& weight_zero_point,
    const at::Tensor& scale,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    bool last) {
  Held held;
  const at::Tensor z = at::empty({1}, at::kInt);  // of uint8, which is multiplied
  *z.data_ptr<int32_t>() = *held.at<int32_t>("zero_point", zero_point, 1, at::kInt) + (format == at::kChar ? 128 : 0);
  TORCH_CHECK(is_real(x.scalar_type()), "real values are made codes of, not ", x.scalar_type());
  const bool line = x.dim() == 3, ordered = x.is_contiguous() && x.size(1) > 1;
  const at::Tensor q = ordered ? coded_images(x, x_scale, z) : quantize(x, x_scale, z, 0, 255, at::kByte);
  const at::Tensor y = convolution(
      line ? q.unsqueeze(2) : q, z, codes, weight_zero_point, scale, bias, {}, stride, padding, dilation, groups, "none",
      {}, {}, x.scalar_type(), {}, {});
  const at::Tensor result = line ? y.squeeze(2) : y;
  const bool as_it_is = last || (!line && !ordered && q.stride(1) == 1 && q.stride(-1) > 1);
  return as_it_is ? result : in_order(result);
}

}  // namespace

TORCH_LIBRARY_IMPL(functional_sq, CPU, library) {
  library.impl("brgemm_quantize", quantize);
  library.impl("brgemm_product", product);
  library.impl("brgemm_product_of_reals", product_of_reals);
  library.impl("brgemm_convolution", convolution);
  library.impl("brgemm_in_order", in_order);
  library.impl("brgemm_convolution_of_reals", convolution_of_reals);
}

// Whether brgemm multiplies integers on this processor.
extern "C" bool works() try {
  const uint8_t q[4] = {255, 1, 2, 3};
  const int8_t weight[4 * COLUMNS] = {-128, 1, 1, 1};
  int32_t sums[COLUMNS];
  brgemm(1, COLUMNS, 4, 4, COLUMNS, COLUMNS, false, q, weight, sums);
  return sums[0] == 255 * -128 + 6 && sums[1] == 0;
} catch (const c10::Error&) {
  return false;
}
