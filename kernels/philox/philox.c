/* keep[i] = tl.rand(key, i) >= p, for i < n: Philox 4x32-10 with counter (i, 0, 0), key (key, 0).
   Written so that a compiler turns the loop over i into vector code. */
#include <pthread.h>
#include <stdint.h>

enum { THREADS = 64, ENOUGH = 1 << 15 }; /* elements that are worth a thread: some 0.1 ms */

struct part {
    uint8_t *out;
    int64_t start, end;
    uint32_t key;
    float p;
};

/* The first n of the indices from low + 2^32 * high, whose upper half stays the same. */
static void same_high(uint8_t *restrict out, int64_t n, uint32_t low, uint32_t high, uint32_t key,
                      float p)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t c0 = low + (uint32_t)i, c1 = high, c2 = 0, c3 = 0;
        uint32_t k0 = key, k1 = 0;
        for (int round = 0; round < 10; round++) {
            uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        int32_t word = (int32_t)c0;
        word = word < 0 ? ~word : word; /* -word - 1 */
        out[i] = (float)word * 4.6566127342e-10f >= p;
    }
}

static void *run(void *argument)
{
    const struct part *part = argument;
    for (int64_t at = part->start; at < part->end;) {
        int64_t stop = ((at >> 32) + 1) << 32;
        if (stop > part->end)
            stop = part->end;
        same_high(part->out + at, stop - at, (uint32_t)at, (uint32_t)(at >> 32), part->key, part->p);
        at = stop;
    }
    return 0;
}

/* Threads of its own, gone when it returns: a pool would not outlive a fork, and OpenMP's would be
   a second one beside torch's. What no thread could be had for is done here. */
void keep(uint8_t *out, int64_t n, uint32_t key, float p, int threads)
{
    struct part parts[THREADS];
    pthread_t ids[THREADS];
    int started[THREADS];
    int64_t most = n / ENOUGH + 1;
    if (threads > THREADS)
        threads = THREADS;
    if (threads > most)
        threads = (int)most;
    for (int t = 0; t < threads; t++) {
        parts[t] = (struct part){out, n * t / threads, n * (t + 1) / threads, key, p};
        started[t] = t && !pthread_create(&ids[t], 0, run, &parts[t]);
    }
    for (int t = 0; t < threads; t++)
        if (!started[t])
            run(&parts[t]);
    for (int t = 0; t < threads; t++)
        if (started[t])
            pthread_join(ids[t], 0);
}
