/* MPI's twin of shm/examples/collectives.rs: the same sizes, iterations, method and lines of output.
 * all_reduce is timed from one buffer to another and in place; both are printed. all_gather_in_place, which MPI does not
 * have, is all_gather and then a pass that reads the result. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static volatile float sink;

static void read_all(const float *values, int count) {
    float sums[8] = {0};
    for (int i = 0; i + 8 <= count; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += values[i + lane];
    for (int lane = 0; lane < 8; lane++) sink += sums[lane];
}

/* The first tenth of the times warms up. */
static void print(const char *name, int bytes, double *times, int iterations) {
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    times += iterations / 10;
    qsort(times, iterations, sizeof *times, compare);
    if (rank == 0)
        printf("%s %d %.3f %.3f\n", name, bytes, times[(iterations - 1) / 2] * 1e6,
               times[(int)((iterations - 1) * 0.99)] * 1e6);
    fflush(stdout);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (int bytes = 4 << 10; bytes <= 4 << 20; bytes *= 2) {
        int iterations = (64 << 20) / bytes, count = bytes / (int)sizeof(float);
        iterations = iterations < 200 ? 200 : iterations > 3000 ? 3000 : iterations;
        float *values = malloc(bytes), *mine = malloc(bytes), *all = malloc(bytes);
        double *times = malloc((iterations + iterations / 10) * sizeof *times);
        if (!values || !mine || !all || !times) MPI_Abort(MPI_COMM_WORLD, 1);
        for (int i = 0; i < count; i++) values[i] = 1e-3f * i * (rank + 1);
        memset(all, 0, bytes);
        for (int kind = 0; kind < 4; kind++) {
            static const char *const names[4] = {"all_reduce", "all_reduce_in_place", "all_gather", "all_gather_in_place"};
            int share = kind >= 2 ? count / size : count;
            for (int i = 0; i < iterations + iterations / 10; i++) {
                memcpy(mine, values, share * sizeof *mine);
                MPI_Barrier(MPI_COMM_WORLD);
                double start = MPI_Wtime();
                if (kind == 0)
                    MPI_Allreduce(mine, all, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                else if (kind == 1)
                    MPI_Allreduce(MPI_IN_PLACE, mine, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                else
                    MPI_Allgather(mine, share, MPI_FLOAT, all, share, MPI_FLOAT, MPI_COMM_WORLD);
                if (kind == 3) read_all(all, count);
                times[i] = MPI_Wtime() - start;
            }
            print(names[kind], bytes, times, iterations);
        }
        free(values);
        free(mine);
        free(all);
        free(times);
    }
    MPI_Finalize();
    return 0;
}
