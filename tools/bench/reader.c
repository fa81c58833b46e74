/* Reads whole files in a random order with several threads, and prints how long that took.
 *     reader THREADS SEED ROOT [direct] < PATHS        (one path a line, relative to ROOT; direct: with O_DIRECT)
 * Every file is opened, asked for its size and read to its end with read(2), as a data loader does. In C, so that it
 * costs nothing beside what it measures: a mount is held against a directory whose files take 15 microseconds each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 1 << 20, MOST_THREADS = 256 };

static char **paths;
static size_t files;
static atomic_size_t next_file, bytes;
static int flags = O_RDONLY | O_CLOEXEC;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static size_t read_file(const char *path, char *buffer) {
    size_t total = 0;
    ssize_t n = 0;
    struct stat st;
    int fd = open(path, flags);
    if (fd < 0 || fstat(fd, &st)) fail(path);
    if (flags & O_DIRECT) /* which cannot be asked for more from within a block, where a file may end */
        while (total < (size_t)st.st_size && (n = read(fd, buffer, BUFFER)) > 0) total += n;
    else
        while ((n = read(fd, buffer, BUFFER)) > 0) total += n;
    if (n < 0) fail(path);
    close(fd);
    return total;
}

static void *reader(void *unused) {
    char *buffer = aligned_alloc(4096, BUFFER);
    size_t i, total = 0;
    if (!buffer) fail("malloc");
    while ((i = next_file++) < files) total += read_file(paths[i], buffer);
    bytes += total;
    free(buffer);
    return unused;
}

static void take_paths(void) {
    char *line = NULL;
    size_t size = 0, room = 0;
    ssize_t n;
    while ((n = getline(&line, &size, stdin)) > 0) {
        if (line[n - 1] == '\n') line[n - 1] = 0;
        if (files == room) {
            room = room ? 2 * room : 1024;
            paths = realloc(paths, room * sizeof *paths);
            if (!paths) fail("realloc");
        }
        paths[files++] = strdup(line);
    }
    free(line);
}

static void shuffle(uint64_t seed) {
    uint64_t x = seed * 0x9E3779B97F4A7C15u + 1; /* xorshift64, which must not begin with 0 */
    for (size_t i = files; i > 1; i--) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        size_t j = x % i;
        char *swapped = paths[i - 1];
        paths[i - 1] = paths[j], paths[j] = swapped;
    }
}

int main(int argc, char **argv) {
    int threads = argc == 4 || (argc == 5 && !strcmp(argv[4], "direct")) ? atoi(argv[1]) : 0;
    if (threads < 1 || threads > MOST_THREADS) {
        fprintf(stderr, "usage: %s THREADS SEED ROOT [direct] < PATHS\n", argv[0]);
        return 2;
    }
    if (argc == 5) flags |= O_DIRECT;
    take_paths();
    shuffle(strtoull(argv[2], NULL, 10));
    if (chdir(argv[3])) fail(argv[3]);
    pthread_t thread[MOST_THREADS];
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, reader, NULL)) fail("pthread_create");
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double seconds = (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9;
    printf("{\"files\": %zu, \"bytes\": %zu, \"seconds\": %.6f}\n", files, (size_t)bytes, seconds);
    return 0;
}
