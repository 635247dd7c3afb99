/* keep[i] = tl.rand(key, i) >= p, for i < n: Philox 4x32-10 with counter (i, 0, 0), key (key, 0).
   Written so that a compiler turns the loop over i into vector code. */
#include <stdint.h>

void keep(uint8_t *restrict out, int64_t n, uint32_t key, float p)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t c0 = (uint32_t)i, c1 = (uint32_t)((uint64_t)i >> 32), c2 = 0, c3 = 0;
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
