// Espalier's kernels. Each is what the CPU pass of the custom op beside its name in worker/src/linalg/ops does, in the same order
// wherever order shows: compiled without fused multiply-add, an elementwise pass gives the same bits. Sums over a row are in
// double, by a tree over the threads of a block.
//
// A block has 256 threads. Counts are 64 bits wide. Matrices are row-major and contiguous.

typedef unsigned long long count_t;

#define THREADS 256
// Digits of the radix selection.
#define DIGIT_BITS 12
#define BINS (1 << DIGIT_BITS)
#define BINS_OF_THREAD (BINS / THREADS)
// The widest block of columns of a sweep.
#define MOST_COLUMNS 1024

#define EACH(i, n)                                                                                                            \
    for (count_t i = (count_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (count_t)gridDim.x * blockDim.x)

// The magnitude of a value as an integer that sorts like it; not-a-number is above everything.
__device__ unsigned int key_of(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Magnitude first, then index: no two are alike.
__device__ count_t rank_of(float value, count_t index) { return ((count_t)key_of(value) << 32) | index; }

// The sum of one value of each thread of the block, known to all of them.
__device__ double sum_of_block(double value) {
    __shared__ double parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            parts[threadIdx.x] += parts[threadIdx.x + half];
        }
        __syncthreads();
    }
    double sum = parts[0];
    __syncthreads();
    return sum;
}

// The largest value of the threads of the block, known to all of them.
__device__ float largest_of_block(float value) {
    __shared__ float parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && parts[threadIdx.x + half] > parts[threadIdx.x]) {
            parts[threadIdx.x] = parts[threadIdx.x + half];
        }
        __syncthreads();
    }
    float largest = parts[0];
    __syncthreads();
    return largest;
}

extern "C" __global__ void accumulate(double *sum, const float *values, count_t n) {
    EACH(i, n) { sum[i] += (double)values[i]; }
}

extern "C" __global__ void accumulate_sums(double *sum, const double *values, count_t n) {
    EACH(i, n) { sum[i] += values[i]; }
}

extern "C" __global__ void reversed(float *out, const float *values, count_t n) {
    EACH(i, n) { out[i] = values[n - 1 - i]; }
}

extern "C" __global__ void identity(float *out, count_t n) {
    EACH(i, n * n) { out[i] = i / n == i % n ? 1.0f : 0.0f; }
}

// Copies what lies above the diagonal below it.
extern "C" __global__ void mirror_upper(float *matrix, count_t n) {
    EACH(i, n * n) {
        count_t row = i / n, column = i % n;
        if (column < row) {
            matrix[i] = matrix[column * n + row];
        }
    }
}

// Where a selection is: the digits of the first kept rank found so far, low word first, and how many ranks lie below them.
__device__ count_t prefix_of(const unsigned int *position) { return (count_t)position[1] << 32 | position[0]; }

// Counts the digit at `shift`, `bits` wide, of the ranks whose digits above it are those found so far.
extern "C" __global__ void count_digits(unsigned int *counts, const float *values, const unsigned int *position, count_t n,
                                        count_t shift, count_t bits) {
    __shared__ unsigned int own[BINS];
    for (unsigned int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        own[bin] = 0;
    }
    __syncthreads();
    count_t prefix = prefix_of(position);
    EACH(i, n) {
        count_t rank = rank_of(values[i], i);
        if (rank >> (shift + bits) == prefix) {
            atomicAdd(&own[(rank >> shift) & ((1u << bits) - 1)], 1u);
        }
    }
    __syncthreads();
    for (unsigned int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (own[bin] > 0) {
            atomicAdd(&counts[bin], own[bin]);
        }
    }
    __syncthreads();
}

// Finds the digit of the rank that has `drop` below it, and clears the counts for the next one. One block.
extern "C" __global__ void find_digit(unsigned int *position, unsigned int *counts, count_t drop, count_t bits) {
    __shared__ unsigned int sums[THREADS];
    unsigned int *own = counts + threadIdx.x * BINS_OF_THREAD;
    unsigned int sum = 0;
    for (unsigned int bin = 0; bin < BINS_OF_THREAD; bin++) {
        sum += own[bin];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned int reach = 1; reach < THREADS; reach *= 2) {
        unsigned int before = threadIdx.x >= reach ? sums[threadIdx.x - reach] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
        __syncthreads();
    }
    count_t prefix = prefix_of(position), below = drop - position[2];
    unsigned int end = sums[threadIdx.x], start = end - sum;
    __syncthreads();
    if (start <= below && below < end) {
        unsigned int bin = 0;
        for (; start + own[bin] <= below; bin++) {
            start += own[bin];
        }
        prefix = prefix << bits | (threadIdx.x * BINS_OF_THREAD + bin);
        position[0] = (unsigned int)prefix;
        position[1] = (unsigned int)(prefix >> 32);
        position[2] += start;
    }
    for (unsigned int bin = 0; bin < BINS_OF_THREAD; bin++) {
        own[bin] = 0;
    }
}

// Keeps what ranks at the position or above, and not below `least`.
extern "C" __global__ void keep_from(unsigned char *keep, const float *values, const unsigned int *position, count_t n,
                                     count_t least) {
    count_t first = prefix_of(position);
    first = first > least ? first : least;
    EACH(i, n) { keep[i] = rank_of(values[i], i) >= first ? 1 : 0; }
}

// Keeps the `kept` largest of every `of` consecutive values; among equal ones the higher index.
extern "C" __global__ void keep_n_of_m(unsigned char *keep, const float *values, count_t groups, count_t kept, count_t of) {
    EACH(group, groups) {
        const float *own = values + group * of;
        for (count_t i = 0; i < of; i++) {
            count_t ahead = 0;
            for (count_t j = 0; j < of; j++) {
                unsigned int one = key_of(own[i]), other = key_of(own[j]);
                ahead += (j > i ? other >= one : other > one) ? 1 : 0;
            }
            keep[group * of + i] = ahead < kept ? 1 : 0;
        }
    }
}

// What is multiplied by (G + rho I)^-1: `merged` is D where it is kept and U elsewhere, scaled by the rho `before`.
extern "C" __global__ void admm_right(float *right, const float *merged, const unsigned char *keep, const float *anchor,
                                      count_t n, float rho, float before) {
    EACH(i, n) { right[i] = merged[i] * (keep[i] == 1 ? rho : -before) - rho * anchor[i]; }
}

// The step of D and U together once B, `primal`, is known.
extern "C" __global__ void admm_update(float *merged, const float *primal, const unsigned char *keep, count_t n, float sigma,
                                       float ratio) {
    EACH(i, n) { merged[i] = sigma * primal[i] + merged[i] * (keep[i] == 1 ? 1.0f - sigma : ratio); }
}

// One step of conjugate gradients of each row on its support: `state` holds V, R and P, each [rows, n], and `image` P times the
// gram. A row whose preconditioned residual has fallen to its goal stays as it is.
extern "C" __global__ void conjugate_step(float *state, const float *image, const unsigned char *keep, const float *inverse,
                                          const double *goals, count_t rows, count_t n) {
    for (count_t row = blockIdx.x; row < rows; row += gridDim.x) {
        float *values = state + row * n, *residual = state + (rows + row) * n, *direction = state + (2 * rows + row) * n;
        const float *product = image + row * n;
        const unsigned char *stays = keep + row * n;
        double energy = 0.0, curvature = 0.0;
        for (count_t j = threadIdx.x; j < n; j += THREADS) {
            energy += (double)residual[j] * (double)(residual[j] * inverse[j]);
            curvature += (double)direction[j] * (double)product[j];
        }
        energy = sum_of_block(energy);
        curvature = sum_of_block(curvature);
        if (!(energy > goals[row] && energy > 0.0)) {
            continue;
        }
        if (!(curvature > 0.0)) {
            // Without curvature a row cannot move any more.
            for (count_t j = threadIdx.x; j < n; j += THREADS) {
                direction[j] = 0.0f;
            }
            continue;
        }
        float alpha = (float)(energy / curvature);
        double next = 0.0;
        for (count_t j = threadIdx.x; j < n; j += THREADS) {
            values[j] += alpha * direction[j];
            residual[j] = (residual[j] - alpha * product[j]) * (float)stays[j];
            next += (double)residual[j] * (double)(residual[j] * inverse[j]);
        }
        next = sum_of_block(next);
        float beta = (float)(next / energy);
        for (count_t j = threadIdx.x; j < n; j += THREADS) {
            direction[j] = residual[j] * inverse[j] + beta * direction[j];
        }
    }
}

// SparseGPT's sweep through a block of columns, a row at a time. `out` gets the weights, the errors that the columns after the
// block make up for, and what stays, each [rows, width]. With `of` above 0, `kept` of every `of` columns are chosen here, by the
// size of a weight divided by its column's cost; else `keep` tells.
extern "C" __global__ void sweep(float *out, const float *weight, const unsigned char *keep, const float *upper,
                                 const float *costs, count_t rows, count_t width, count_t kept, count_t of) {
    __shared__ float own[MOST_COLUMNS];
    __shared__ unsigned char stays[MOST_COLUMNS];
    __shared__ float error;
    for (count_t row = blockIdx.x; row < rows; row += gridDim.x) {
        for (count_t c = threadIdx.x; c < width; c += THREADS) {
            own[c] = weight[row * width + c];
            stays[c] = keep[row * width + c];
        }
        __syncthreads();
        for (count_t c = 0; c < width; c++) {
            if (of > 0 && c % of == 0) {
                for (count_t i = threadIdx.x; i < of; i += THREADS) {
                    float value = own[c + i];
                    unsigned int one = key_of((value < 0.0f ? -value : value) / costs[c + i]);
                    count_t ahead = 0;
                    for (count_t j = 0; j < of; j++) {
                        float rival = own[c + j];
                        unsigned int other = key_of((rival < 0.0f ? -rival : rival) / costs[c + j]);
                        ahead += (j > i ? other >= one : other > one) ? 1 : 0;
                    }
                    stays[c + i] = ahead < kept ? 1 : 0;
                }
                __syncthreads();
            }
            if (threadIdx.x == 0) {
                error = stays[c] == 1 ? 0.0f : own[c] / upper[c * width + c];
                own[c] = stays[c] == 1 ? own[c] : 0.0f;
                out[(rows + row) * width + c] = error;
            }
            __syncthreads();
            for (count_t j = c + 1 + threadIdx.x; j < width; j += THREADS) {
                own[j] -= error * upper[c * width + j];
            }
            __syncthreads();
        }
        for (count_t c = threadIdx.x; c < width; c += THREADS) {
            out[row * width + c] = own[c];
            out[(2 * rows + row) * width + c] = (float)stays[c];
        }
        __syncthreads();
    }
}

// softmax(scale * scores) over the keys that each row sees, zero elsewhere. Row `row` is of token `first_token + row /
// rows_per_token` and sees the keys up to it, or the last `window` of them if that is not 0; columns begin at `first_key`.
extern "C" __global__ void causal_softmax(float *scores, count_t rows, count_t columns, count_t first_token,
                                          count_t rows_per_token, count_t first_key, count_t window, float scale) {
    for (count_t row = blockIdx.x; row < rows; row += gridDim.x) {
        float *own = scores + row * columns;
        count_t seen = first_token + row / rows_per_token + 1;
        count_t end = seen > first_key ? seen - first_key : 0;
        count_t start = window > 0 && end > window ? end - window : 0;
        end = end < columns ? end : columns;
        float largest = -__int_as_float(0x7f800000);
        for (count_t j = start + threadIdx.x; j < end; j += THREADS) {
            largest = own[j] > largest ? own[j] : largest;
        }
        largest = largest_of_block(largest);
        double sum = 0.0;
        for (count_t j = threadIdx.x; j < columns; j += THREADS) {
            float value = j >= start && j < end ? expf((own[j] - largest) * scale) : 0.0f;
            own[j] = value;
            sum += (double)value;
        }
        float factor = 1.0f / (float)sum_of_block(sum);
        for (count_t j = start + threadIdx.x; j < end; j += THREADS) {
            own[j] *= factor;
        }
    }
}
