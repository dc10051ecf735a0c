// Long convolution on the CPU, forward and backward, through a Fourier transform whose SIMD lanes are channels.
//
//   y_i = skip u_i + sum_{j<=i} after_{i-j} u_j + sum_{j>i} before_{j-i} u_j
//
// Letters: B batch, L length, D channels, N points (a power of two >= L), R rows of S points. Tensors are float32.
// Polynomials are taken modulo x^N = i, where N complex points hold a real convolution: what wraps around comes back
// times i, so a lag of -m, put as -i at N - m, falls on the real part where it belongs and on the imaginary part where
// it does not. x^M - w splits into x^(M/4) - z, + z, - iz, + iz with z^4 = w, down to values at the N roots of i: one
// twiddle for all points of a block, none for its position, and no order to restore, which products do not mind.
// A transform that leaves the cache runs in two passes over memory: the first levels on a tile of columns at a time,
// the others on one row. Source: right-angle circular convolution (Nussbaumer 1981); four-step transform (Bailey 1990).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16; // channels a block, which fill a register; also positions a tile, so that it turns
#elif defined(__AVX__)
constexpr int64_t kLanes = 8; // 16 take 4 times as long there
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kRow = 4096; // points that are transformed in the second-level cache: 512 KiB of 16 lanes
constexpr int64_t kNear = 256; // points that are transformed in the first-level cache: 32 KiB
constexpr int64_t kHuge = 1 << 21; // bytes of a large page

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct Point {
  Vec re, im;
};

struct Twiddle { // z, z^2, z^3
  float re[3], im[3];
};

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Point times(Point a, float re, float im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }

inline Point times_conj(Point a, float re, float im) { return {a.re * re + a.im * im, a.im * re - a.re * im}; }

// z of all blocks of a level. A block's number, its bits reversed, is the number of turns of w: independent of N.
struct Levels {
  std::array<std::vector<Twiddle>, 48> of;
  std::mutex guard;

  void build(int64_t count) {
    const std::lock_guard<std::mutex> lock(guard);
    for (int64_t level = 0; level < count; ++level) {
      if (!of[level].empty()) continue;
      std::vector<Twiddle> made(int64_t{1} << level);
      for (size_t block = 0; block < made.size(); ++block) {
        double turns = 0;
        for (int64_t bit = 0; bit < level; ++bit) turns += (block >> bit & 1) * std::ldexp(1.0, -int(bit) - 1);
        const double quarter = (std::ldexp(0.25, -int(level)) + turns) / 4;
        const std::complex<double> z = std::polar(1.0, 2 * M_PI * quarter), powers[] = {z, z * z, z * z * z};
        for (int k = 0; k < 3; ++k) {
          made[block].re[k] = float(powers[k].real());
          made[block].im[k] = float(powers[k].imag());
        }
      }
      of[level] = std::move(made);
    }
  }
};

Levels levels;

void split4(Point* x, int64_t quarter, const Twiddle& z) {
  const Twiddle w = z;
  for (Point* end = x + quarter; x < end; ++x) {
    const Point a = x[0], b = times(x[quarter], w.re[0], w.im[0]), c = times(x[2 * quarter], w.re[1], w.im[1]),
                d = times(x[3 * quarter], w.re[2], w.im[2]);
    const Point ac{a.re + c.re, a.im + c.im}, a_c{a.re - c.re, a.im - c.im};
    const Point bd{b.re + d.re, b.im + d.im}, b_d{b.re - d.re, b.im - d.im};
    x[0] = {ac.re + bd.re, ac.im + bd.im};
    x[quarter] = {ac.re - bd.re, ac.im - bd.im};
    x[2 * quarter] = {a_c.re - b_d.im, a_c.im + b_d.re};
    x[3 * quarter] = {a_c.re + b_d.im, a_c.im - b_d.re};
  }
}

void join4(Point* x, int64_t quarter, const Twiddle& z) { // undoes split4, times 4
  const Twiddle w = z;
  for (Point* end = x + quarter; x < end; ++x) {
    const Point a = x[0], b = x[quarter], c = x[2 * quarter], d = x[3 * quarter];
    const Point ab{a.re + b.re, a.im + b.im}, a_b{a.re - b.re, a.im - b.im};
    const Point cd{c.re + d.re, c.im + d.im}, c_d{c.re - d.re, c.im - d.im};
    x[0] = {ab.re + cd.re, ab.im + cd.im};
    x[quarter] = times_conj({a_b.re + c_d.im, a_b.im - c_d.re}, w.re[0], w.im[0]);
    x[2 * quarter] = times_conj({ab.re - cd.re, ab.im - cd.im}, w.re[1], w.im[1]);
    x[3 * quarter] = times_conj({a_b.re - c_d.im, a_b.im + c_d.re}, w.re[2], w.im[2]);
  }
}

void split2(Point* x, int64_t half, const Twiddle& z) {
  for (Point* end = x + half; x < end; ++x) {
    const Point a = x[0], b = times(x[half], z.re[1], z.im[1]);
    x[0] = {a.re + b.re, a.im + b.im};
    x[half] = {a.re - b.re, a.im - b.im};
  }
}

void join2(Point* x, int64_t half, const Twiddle& z) {
  for (Point* end = x + half; x < end; ++x) {
    const Point a = x[0], b = x[half];
    x[0] = {a.re + b.re, a.im + b.im};
    x[half] = times_conj({a.re - b.re, a.im - b.im}, z.re[1], z.im[1]);
  }
}

inline bool odd_levels(int64_t size, int64_t stop) { return __builtin_ctzll(size / stop) & 1; }

// Split a block of `size` points, number `block` of its level, into blocks of `stop` points.
void split(Point* x, int64_t size, int64_t stop, int64_t level, int64_t block) {
  if (odd_levels(size, stop)) {
    split2(x, size / 2, levels.of[level][block]);
    for (int64_t i = 0; i < 2 && size / 2 > stop; ++i)
      split(x + i * size / 2, size / 2, stop, level + 1, 2 * block + i);
  } else if (size > kNear) {
    split4(x, size / 4, levels.of[level][block]);
    for (int64_t i = 0; i < 4 && size / 4 > stop; ++i)
      split(x + i * size / 4, size / 4, stop, level + 2, 4 * block + i);
  } else {
    for (int64_t part = size, count = 1; part > stop; part /= 4, count *= 4, level += 2, block *= 4)
      for (int64_t i = 0; i < count; ++i) split4(x + i * part, part / 4, levels.of[level][block + i]);
  }
}

// Undo `split`, times size / stop.
void join(Point* x, int64_t size, int64_t stop, int64_t level, int64_t block) {
  if (odd_levels(size, stop)) {
    for (int64_t i = 0; i < 2 && size / 2 > stop; ++i)
      join(x + i * size / 2, size / 2, stop, level + 1, 2 * block + i);
    join2(x, size / 2, levels.of[level][block]);
  } else if (size > kNear) {
    for (int64_t i = 0; i < 4 && size / 4 > stop; ++i)
      join(x + i * size / 4, size / 4, stop, level + 2, 4 * block + i);
    join4(x, size / 4, levels.of[level][block]);
  } else {
    int64_t count = size / stop, part = stop;
    level += __builtin_ctzll(count);
    while (part < size) {
      part *= 4, count /= 4, level -= 2;
      for (int64_t i = 0; i < count; ++i) join4(x + i * part, part / 4, levels.of[level][block * count + i]);
    }
  }
}

// Elements of two rows in turn: the first half of each from 0, the second from kLanes / 2.
inline Vec riffle(Vec a, Vec b, int64_t first) {
#ifdef __clang__ // makes a shuffle of it; it has no __builtin_shuffle
  Vec both;
  for (int64_t i = 0; i < kLanes; ++i) both[i] = (i % 2 ? b : a)[first + i / 2];
  return both;
#else
  IVec order;
  for (int64_t i = 0; i < kLanes; ++i) order[i] = first + i / 2 + i % 2 * kLanes;
  return __builtin_shuffle(a, b, order);
#endif
}

// Channels become positions: as many riffles of all rows as a lane's number has bits.
inline void turn(Vec* tile) {
  Vec other[kLanes];
  for (int64_t round = 1; round < kLanes; round *= 2) {
    std::copy_n(tile, kLanes, other);
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      tile[2 * i] = riffle(other[i], other[i + kLanes / 2], 0);
      tile[2 * i + 1] = riffle(other[i], other[i + kLanes / 2], kLanes / 2);
    }
  }
}

// Up to kLanes channels of one sequence, or of kernels; one of the strides is 1.
struct View {
  float* data;
  int64_t length, lanes, of_position, of_channel;

  bool whole(int64_t first) const { return lanes == kLanes && first + kLanes <= length; }
  int64_t stride() const { return of_channel == 1 ? of_position : of_channel; }

  // Positions first to first + kLanes - 1, zeros beyond the end and in channels that are not there.
  void get(int64_t first, Vec* tile) const {
    if (whole(first)) {
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = load(data + first * of_position + i * stride());
      if (of_channel != 1) turn(tile);
      return;
    }
    std::fill_n(tile, kLanes, Vec{});
    for (int64_t i = 0; i < kLanes && first + i < length; ++i)
      for (int64_t c = 0; c < lanes; ++c) tile[i][c] = data[(first + i) * of_position + c * of_channel];
  }

  void put(int64_t first, Vec* tile) const {
    if (whole(first)) {
      if (of_channel != 1) turn(tile);
      for (int64_t i = 0; i < kLanes; ++i) store(data + first * of_position + i * stride(), tile[i]);
      return;
    }
    for (int64_t i = 0; i < kLanes && first + i < length; ++i)
      for (int64_t c = 0; c < lanes; ++c) data[(first + i) * of_position + c * of_channel] = tile[i][c];
  }
};

// Large pages where the system has them: a transform's columns lie far apart.
void huge(void* start, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (uintptr_t(start) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (uintptr_t(start) + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void huge(const at::Tensor& x) { huge(x.data_ptr(), x.nbytes()); }

// Memory of a call, which the next one finds again: at a million positions the system's clearing of fresh pages took
// 11 % of the time (25 % on a busy machine), two fifths of it for this; at 65,536 next to nothing.
class Room {
 public:
  explicit Room(size_t bytes) {
    const std::lock_guard<std::mutex> lock(guard);
    std::swap(start, kept);
    std::swap(size, kept_size);
    if (size >= bytes) return;
    std::free(start);
    size = (bytes + kHuge - 1) / kHuge * kHuge;
    start = std::aligned_alloc(kHuge, size);
    TORCH_CHECK(start, "long_conv: not enough memory for ", size, " bytes");
    huge(start, size);
  }

  ~Room() {
    const std::lock_guard<std::mutex> lock(guard);
    if (size > kept_size) {
      std::swap(start, kept);
      std::swap(size, kept_size);
    }
    std::free(start);
  }

  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  Point* points() const { return static_cast<Point*>(start); }

 private:
  void* start = nullptr;
  size_t size = 0;
  inline static std::mutex guard;
  inline static void* kept = nullptr;
  inline static size_t kept_size = 0;
};

// Sizes of a call and its room: `slots` transforms a worker, and kLanes columns for each thread.
struct Plan {
  int64_t B, L, D, N, R, S, blocks, slots;
  std::optional<Room> room;

  Plan(const at::Tensor& u, int64_t slots_) : B(u.size(0)), L(u.size(1)), D(u.size(2)), N(kLanes), slots(slots_) {
    while (N < L) N *= 2;
    S = std::min(N, kRow);
    R = N / S;
    blocks = (D + kLanes - 1) / kLanes;
    levels.build(__builtin_ctzll(N) - 1);
    const int64_t threads = at::get_num_threads();
    room.emplace((R > 1 ? slots * N + threads * R * kLanes : threads * slots * N) * sizeof(Point));
  }

  Point* slot(int64_t k) const { return room->points() + ((R > 1 ? 0 : at::get_thread_num() * slots) + k) * N; }
  Point* columns() const { return room->points() + slots * N + at::get_thread_num() * R * kLanes; }

  // Either blocks of channels run beside each other, or the passes of a long one are shared out.
  template <typename Run>
  void each_block(Run run) const {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i * kLanes);
    };
    if (R > 1) some(0, blocks);
    else at::parallel_for(0, blocks, 1, some);
  }

  template <typename Run>
  void each(int64_t count, Run run) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i);
    });
  }

  // First pass: get(position, kLanes points) to values modulo the R first factors, row by row.
  template <typename Get>
  void in(Point* x, Get get) const {
    each(S / kLanes, [&](int64_t group) {
      if (R == 1) return get(group * kLanes, x + group * kLanes);
      Point* columns = this->columns();
      for (int64_t r = 0; r < R; ++r) get(r * S + group * kLanes, columns + r * kLanes);
      split(columns, R * kLanes, kLanes, 0, 0);
      for (int64_t r = 0; r < R; ++r)
        std::memcpy(x + r * S + group * kLanes, columns + r * kLanes, kLanes * sizeof(Point));
    });
  }

  // Last pass: what `in` undoes, to put(position, kLanes points).
  template <typename Put>
  void out(const Point* x, Put put) const {
    each(S / kLanes, [&](int64_t group) {
      if (R == 1) return put(group * kLanes, x + group * kLanes);
      Point* columns = this->columns();
      for (int64_t r = 0; r < R; ++r)
        std::memcpy(columns + r * kLanes, x + r * S + group * kLanes, kLanes * sizeof(Point));
      join(columns, R * kLanes, kLanes, 0, 0);
      for (int64_t r = 0; r < R; ++r) put(r * S + group * kLanes, columns + r * kLanes);
    });
  }

  void split_row(Point* x, int64_t r) const { split(x + r * S, S, 1, __builtin_ctzll(R), r); }
  void join_row(Point* x, int64_t r) const { join(x + r * S, S, 1, __builtin_ctzll(R), r); }

  View sequence(const at::Tensor& x, int64_t b, int64_t d) const {
    return {static_cast<float*>(x.data_ptr()) + b * x.stride(0) + d * x.stride(2), L, std::min(kLanes, D - d),
            x.stride(1), x.stride(2)};
  }
  View kernel(const at::Tensor& x, int64_t d) const {
    return {static_cast<float*>(x.data_ptr()) + d * x.stride(0), L, std::min(kLanes, D - d), x.stride(1), x.stride(0)};
  }

  void in_sequence(Point* x, const at::Tensor& from_BLD, int64_t b, int64_t d) const {
    in(x, [&, from = sequence(from_BLD, b, d)](int64_t first, Point* to) {
      Vec tile[kLanes];
      from.get(first, tile);
      for (int64_t i = 0; i < kLanes; ++i) to[i] = {tile[i], Vec{}};
    });
  }

  void out_sequence(const Point* x, const at::Tensor& to_BLD, int64_t b, int64_t d) const {
    out(x, [&, to = sequence(to_BLD, b, d)](int64_t first, const Point* from) {
      Vec tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = from[i].re * (1.f / N);
      to.put(first, tile);
    });
  }

  // The skip is lag 0; lag -m stands as -i at N - m.
  void in_kernel(Point* x, const at::Tensor& after_DL, const std::optional<at::Tensor>& before_DL,
                 const at::Tensor& skip_D, int64_t d) const {
    const float* skip = skip_D.const_data_ptr<float>() + d;
    in(x, [&, after = kernel(after_DL, d)](int64_t first, Point* to) {
      Vec tile[kLanes];
      after.get(first, tile);
      for (int64_t i = 0; i < kLanes; ++i) to[i] = {tile[i], Vec{}};
      for (int64_t c = 0; c < after.lanes && first == 0; ++c) to[0].re[c] += skip[c];
      if (!before_DL) return;
      kernel(*before_DL, d).get(N - first - kLanes + 1, tile);
      for (int64_t i = 0; i < kLanes; ++i) to[i].im = -tile[kLanes - 1 - i];
    });
  }

  void out_kernel(const Point* x, const at::Tensor& after_DL, const std::optional<at::Tensor>& before_DL,
                  const at::Tensor& skip_D, int64_t d) const {
    float* skip = skip_D.mutable_data_ptr<float>() + d;
    out(x, [&, after = kernel(after_DL, d)](int64_t first, const Point* from) {
      Vec tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = from[i].re * (1.f / N);
      for (int64_t c = 0; c < after.lanes && first == 0; ++c) skip[c] = tile[0][c];
      after.put(first, tile);
      if (!before_DL) return;
      const View before = kernel(*before_DL, d);
      for (int64_t c = 0; c < before.lanes && first == 0; ++c) before.data[c * before.of_channel] = 0;
      for (int64_t i = 0; i < kLanes; ++i) tile[kLanes - 1 - i] = from[i].im * (-1.f / N);
      before.put(N - first - kLanes + 1, tile);
    });
  }
};

// As it is where channels or positions lie next to each other.
at::Tensor laid_out(const at::Tensor& x) {
  const bool either = x.dim() > 0 && (x.stride(-1) == 1 || (x.dim() > 1 && x.stride(-2) == 1));
  return either ? x : x.contiguous();
}

// The loops trust shapes and layout: what does not fit would be read beyond its end.
struct Inputs {
  at::Tensor u, after, skip;
  std::optional<at::Tensor> before;

  Inputs(const at::Tensor& u_, const at::Tensor& after_, const std::optional<at::Tensor>& before_,
         const at::Tensor& skip_)
      : u(laid_out(u_)), after(laid_out(after_)), skip(laid_out(skip_)) {
    if (before_) before = laid_out(*before_);
    const bool fits = u.dim() == 3 && after.dim() == 2 && after.size(0) == u.size(2) && after.size(1) == u.size(1) &&
                      skip.dim() == 1 && skip.size(0) == u.size(2) && (!before || before->sizes() == after.sizes());
    TORCH_CHECK(fits, "long_conv: shapes do not fit: u ", u.sizes(), ", after ", after.sizes(), ", before ",
                before ? before->sizes() : at::IntArrayRef(), ", skip ", skip.sizes());
    for (const at::Tensor* x : {&u, &after, &skip, before ? &*before : &u})
      TORCH_CHECK(x->device().is_cpu() && x->scalar_type() == at::kFloat, "long_conv: ", x->scalar_type(), " on ",
                  x->device(), " instead of float32 on the CPU");
  }
};

at::Tensor conv_forward(const at::Tensor& u, const at::Tensor& after, const std::optional<at::Tensor>& before,
                        const at::Tensor& skip) {
  const Inputs given(u, after, before, skip);
  at::Tensor y = at::empty(u.sizes(), u.options());
  if (u.numel() == 0) return y;
  const Plan plan(u, 2);
  huge(y);
  plan.each_block([&](int64_t d) {
    Point *x = plan.slot(0), *kernel = plan.slot(1);
    plan.in_kernel(kernel, given.after, given.before, given.skip, d);
    for (int64_t b = 0; b < plan.B; ++b) {
      plan.in_sequence(x, given.u, b, d);
      plan.each(plan.R, [&](int64_t r) {
        if (b == 0) plan.split_row(kernel, r);
        plan.split_row(x, r);
        for (int64_t i = r * plan.S; i < (r + 1) * plan.S; ++i) {
          const Point a = x[i], k = kernel[i];
          x[i] = {a.re * k.re - a.im * k.im, a.re * k.im + a.im * k.re};
        }
        plan.join_row(x, r);
      });
      plan.out_sequence(x, y, b, d);
    }
  });
  return y;
}

// Gradients of all inputs that there are, in their order; correlation takes the conjugate's values.
std::vector<at::Tensor> conv_backward(const at::Tensor& dy_, const at::Tensor& u, const at::Tensor& after,
                                      const std::optional<at::Tensor>& before, const at::Tensor& skip) {
  const Inputs given(u, after, before, skip);
  const at::Tensor dy = Inputs(dy_, after, before, skip).u;
  TORCH_CHECK(dy.sizes() == u.sizes(), "long_conv: gradient ", dy.sizes(), " of output ", u.sizes());
  at::Tensor du = at::empty(u.sizes(), u.options()), dafter = at::empty(after.sizes(), u.options());
  at::Tensor dskip = at::empty(skip.sizes(), u.options());
  std::optional<at::Tensor> dbefore;
  if (before) dbefore = at::empty(after.sizes(), u.options());
  std::vector<at::Tensor> grads{du, dafter, dskip};
  if (dbefore) grads.insert(grads.begin() + 2, *dbefore);
  if (u.numel() == 0) {
    for (const at::Tensor& x : grads) x.zero_();
    return grads;
  }
  const Plan plan(u, u.size(0) > 1 ? 4 : 3);
  for (const at::Tensor& x : grads) huge(x);
  plan.each_block([&](int64_t d) {
    Point *dx = plan.slot(0), *kernel = plan.slot(1), *dkernel = plan.slot(2);
    plan.in_kernel(kernel, given.after, given.before, given.skip, d);
    for (int64_t b = 0; b < plan.B; ++b) {
      Point* x = b == 0 ? dkernel : plan.slot(3); // the first sequence's place takes the sum over all
      plan.in_sequence(dx, dy, b, d);
      plan.in_sequence(x, given.u, b, d);
      plan.each(plan.R, [&](int64_t r) {
        if (b == 0) plan.split_row(kernel, r);
        plan.split_row(dx, r);
        plan.split_row(x, r);
        for (int64_t i = r * plan.S; i < (r + 1) * plan.S; ++i) {
          const Point g = dx[i], a = x[i], k = kernel[i], sum = b == 0 ? Point{} : dkernel[i];
          dkernel[i] = {sum.re + g.re * a.re + g.im * a.im, sum.im + g.im * a.re - g.re * a.im};
          dx[i] = {g.re * k.re + g.im * k.im, g.im * k.re - g.re * k.im};
        }
        plan.join_row(dx, r);
        if (b == plan.B - 1) plan.join_row(dkernel, r);
      });
      plan.out_sequence(dx, du, b, d);
    }
    plan.out_kernel(dkernel, dafter, dbefore, dskip, d);
  });
  return grads;
}

} // namespace

TORCH_LIBRARY(rna_conv, m) {
  m.def("forward(Tensor u, Tensor after, Tensor? before, Tensor skip) -> Tensor");
  m.def("backward(Tensor dy, Tensor u, Tensor after, Tensor? before, Tensor skip) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rna_conv, CPU, m) {
  m.impl("forward", &conv_forward);
  m.impl("backward", &conv_backward);
}
