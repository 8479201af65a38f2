/* How long two CPUs take to hand a cache line over and back, in ns: whether they share a cache.
 *
 * A virtual machine's CPUs are moved about by its host. Sometimes two of them share a last-level
 * cache and sometimes they do not, for seconds or minutes, and nothing in the guest tells. Whatever
 * passes from one process to another costs up to three times as much then.
 *
 * usage: handover
 *   stdout  the median of ROUNDS rounds between the first two CPUs this process may use; 0 if it
 *           may use only one
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum {
    ROUNDS = 15, /* the median: others may take a CPU away in some of them */
    TRIPS = 10000,
};
static _Atomic uint32_t line __attribute__((aligned(128)));
static int cpus[2];

static void stay_on(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
        perror("sched_setaffinity");
        exit(1);
    }
}

static void wait_for(uint32_t value)
{
    while (atomic_load_explicit(&line, memory_order_acquire) != value)
        ;
}

static void *answer(void *unused)
{
    stay_on(cpus[1]);
    for (uint32_t i = 0; i < (uint32_t)ROUNDS * TRIPS; i++) {
        wait_for(2 * i + 1);
        atomic_store_explicit(&line, 2 * i + 2, memory_order_release);
    }
    return unused;
}

static double now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(void)
{
    cpu_set_t allowed;
    int found = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) {
        perror("sched_getaffinity");
        return 1;
    }
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, &allowed))
            cpus[found++] = cpu;
    if (found < 2) {
        puts("0");
        return 0;
    }
    pthread_t other;
    stay_on(cpus[0]);
    if (pthread_create(&other, NULL, answer, NULL)) {
        perror("pthread_create");
        return 1;
    }
    double rounds[ROUNDS];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        double start = now_ns();
        for (uint32_t i = round * TRIPS; i < (round + 1) * TRIPS; i++) {
            atomic_store_explicit(&line, 2 * i + 1, memory_order_release);
            wait_for(2 * i + 2);
        }
        rounds[round] = (now_ns() - start) / TRIPS;
    }
    pthread_join(other, NULL);
    qsort(rounds, ROUNDS, sizeof rounds[0], ascending);
    printf("%.1f\n", rounds[ROUNDS / 2]);
    return 0;
}
