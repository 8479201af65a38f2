/* A second thread that computes all the time, as the main thread of P4's and T4's subjects does. */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

static void *spin(void *unused)
{
    for (volatile uint64_t i = 0;; i++)
        ;
    return unused;
}

static bool start_spinning(void)
{
    pthread_t thread;
    return pthread_create(&thread, NULL, spin, NULL) == 0;
}
