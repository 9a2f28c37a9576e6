// Rotary position embedding (kernels/src/cpu/rotary.rs, kernels/src/cpu/math.rs), in place.
//
// rotary_embedding: rotates the q and k heads of qkv, the first `heads` heads of each row.
//   qkv [rows][qkv_stride] f32, positions [rows], inverse_frequencies [pairs] f32
//   layout 0 (Half): element i of a head turns with element i + pairs; 1 (Interleaved): 2 i with 2 i + 1
//   grid (rows), block 128; 1 <= pairs <= MAX_PAIRS, 2 * pairs <= head_dim
//
// Angles are products in f64, exact for every u32 position.
#include "phx.cuh"

const u32 THREADS = 128;
const u32 MAX_PAIRS = 256;

// fdlibm's k_sin and k_cos after a reduction by multiples of pi/2 in two parts, of which the first has 33 bits;
// no slow path and no table, unlike CUDA's sincos.
PHX_DEV void sin_cos(double x, double& sin, double& cos) {
  const double HALF_PI_HIGH = 0x1.921fb544p+0, HALF_PI_LOW = 0x1.0b4611a626331p-34, TWO_OVER_PI = 0x1.45f306dc9c883p-1;
  const double n = round_even(x * TWO_OVER_PI);
  const double r = (x - n * HALF_PI_HIGH) - n * HALF_PI_LOW;
  const double z = r * r;
  double p = 1.58969099521155010221e-10;
  p = p * z - 2.50507602534068634195e-08;
  p = p * z + 2.75573137070700676789e-06;
  p = p * z - 1.98412698298579493134e-04;
  p = p * z + 8.33333333332248946124e-03;
  p = p * z - 1.66666666666666324348e-01;
  double q = -1.13596475577881948265e-11;
  q = q * z + 2.08757232129817482790e-09;
  q = q * z - 2.75573143513906633035e-07;
  q = q * z + 2.48015872894767294178e-05;
  q = q * z - 1.38888888888741095749e-03;
  q = q * z + 4.16666666666666019037e-02;
  const double s = r + r * z * p, c = 1.0 - (0.5 * z - z * z * q);
  const int quadrant = (int)((long long)n & 3);
  sin = quadrant & 1 ? c : s;
  cos = quadrant & 1 ? s : c;
  if (quadrant & 2) sin = -sin;
  if (quadrant == 1 || quadrant == 2) cos = -cos;
}

PHX_KERNEL __launch_bounds__(128)
rotary_embedding(float* __restrict__ qkv, u32 qkv_stride, u32 heads, u32 head_dim, const u32* __restrict__ positions,
                 const float* __restrict__ inverse_frequencies, u32 pairs, float attention_factor, u32 layout) {
  __shared__ float cosines[MAX_PAIRS], sines[MAX_PAIRS];
  for (u32 i = threadIdx.x; i < pairs; i += THREADS) {
    double s, c;
    sin_cos((double)positions[blockIdx.x] * (double)inverse_frequencies[i], s, c);
    cosines[i] = (float)(c * (double)attention_factor);
    sines[i] = (float)(s * (double)attention_factor);
  }
  __syncthreads();
  float* row = qkv + (u64)blockIdx.x * qkv_stride;
  for (u32 i = threadIdx.x; i < heads * pairs; i += THREADS) {
    const u32 pair = i % pairs;
    float* head = row + (i / pairs) * head_dim;
    float* first = head + (layout == 0 ? pair : 2 * pair);
    float* second = first + (layout == 0 ? pairs : 1);
    const float a = *first, b = *second, c = cosines[pair], s = sines[pair];
    *first = a * c - b * s;
    *second = b * c + a * s;
  }
}
