"""System calls that compiled modules make without the GIL, and memory that several threads look at."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from coordlfs.kernel.linux cimport statx

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/aio_abi.h>
    #include <linux/openat2.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SYS_cachestat
    #define SYS_cachestat 451
    #endif

    #if defined(__x86_64__)
    #define PAUSE() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define PAUSE() __asm__ volatile("yield")
    #else
    #define PAUSE() __asm__ volatile("")
    #endif

    struct counted { uint64_t cached, dirty, writeback, evicted, recently_evicted; };

    static inline int open_beneath(int directory, const char *path, int flags, int resolve) {
        struct open_how how = {
            .flags = flags | O_CLOEXEC | O_NOFOLLOW,
            .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | resolve,
        };
        return syscall(SYS_openat2, directory, path, &how, sizeof how);
    }

    static inline int cachestat(int fd, uint64_t length, struct counted *found) {
        uint64_t range[2] = {0, length};
        return syscall(SYS_cachestat, fd, range, found, 0);
    }

    static inline void take_turn(int *turn) {
        for (int i = 0; i < 300; i++) {
            if (!__atomic_load_n(turn, __ATOMIC_RELAXED) && !__atomic_exchange_n(turn, 1, __ATOMIC_ACQUIRE)) return;
            PAUSE();
        }
    }

    static inline void end_turn(int *turn) {
        __atomic_store_n(turn, 0, __ATOMIC_RELEASE);
    }

    // Linux AIO: see coordlfs.kernel.aio. What has ended is seen in memory, without a call.
    static inline int set_up(unsigned most, aio_context_t *context) {
        return syscall(SYS_io_setup, most, context);
    }

    static inline int submit_at(aio_context_t context, int slot, int fd, void *into, size_t length, int64_t at, int events) {
        struct iocb block = {
            .aio_data = slot,
            .aio_lio_opcode = IOCB_CMD_PREAD,
            .aio_fildes = fd,
            .aio_buf = (uintptr_t)into,
            .aio_nbytes = length,
            .aio_offset = at,
            .aio_flags = IOCB_FLAG_RESFD,
            .aio_resfd = events,
        };
        struct iocb *blocks[] = {&block};
        return syscall(SYS_io_submit, context, 1, blocks);
    }

    static inline int submit(aio_context_t context, int slot, int fd, void *into, size_t length, int events) {
        return submit_at(context, slot, fd, into, length, 0, events);
    }

    static inline int has_ended(aio_context_t context) {
        struct { unsigned id, nr, head, tail, magic; } *ring = (void *)context;
        return ring->magic != 0xa10a10a1 ||
               __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) != __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
    }

    static inline int take_ended(aio_context_t context, struct io_event *event) {
        struct timespec at_once = {0, 0};
        return has_ended(context) ? syscall(SYS_io_getevents, context, 0, 1, event, &at_once) : 0;
    }

    // Which of 64 slots are free, a bit each: one is taken, or -1.
    static inline int take_bit(uint64_t *bits) {
        uint64_t found = __atomic_load_n(bits, __ATOMIC_RELAXED);
        while (found) {
            if (__atomic_compare_exchange_n(bits, &found, found & (found - 1), 1, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
                return __builtin_ctzll(found);
        }
        return -1;
    }

    static inline void give_bit(uint64_t *bits, int bit) {
        __atomic_fetch_or(bits, 1ULL << bit, __ATOMIC_RELEASE);
    }

    static inline int load(int *word) {
        return __atomic_load_n(word, __ATOMIC_SEQ_CST);
    }

    static inline void store(uint64_t *word, uint64_t n) {
        __atomic_store_n(word, n, __ATOMIC_SEQ_CST);
    }

    static inline int attributes(int fd, struct statx *found) {
        return statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, found);
    }
    """
    union epoll_data:
        int fd

    struct epoll_event:
        epoll_data data

    int epoll_wait(int poller, epoll_event *events, int most, int timeout) nogil
    int eventfd(unsigned int value, int flags)
    const int EFD_CLOEXEC, EFD_NONBLOCK, O_DIRECT, O_NOATIME, O_PATH, RESOLVE_CACHED, RWF_NOWAIT

    struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t preadv2(int fd, const iovec *vectors, int count, int64_t offset, int flags) nogil
    ssize_t writev(int fd, const iovec *vectors, int count) nogil

    struct counted:
        uint64_t cached

    ctypedef unsigned long aio_context_t

    struct io_event:
        uint64_t data
        int64_t res

    int set_up(unsigned int most, aio_context_t *context)
    int submit_at(
        aio_context_t context, int slot, int fd, void *into, size_t length, int64_t at, int events
    ) nogil
    int submit(aio_context_t context, int slot, int fd, void *into, size_t length, int events) nogil
    bint has_ended(aio_context_t context) nogil
    int take_ended(aio_context_t context, io_event *event) nogil
    int open_beneath(int directory, const char *path, int flags, int resolve) nogil
    int cachestat(int fd, uint64_t length, counted *found) nogil
    int attributes(int fd, statx *found) nogil
    void take_turn(int *turn) nogil
    void end_turn(int *turn) nogil
    int take_bit(uint64_t *bits) nogil
    void give_bit(uint64_t *bits, int bit) nogil
    int load(int *word) nogil
    void store(uint64_t *word, uint64_t n) nogil
