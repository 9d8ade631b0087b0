/* Preloaded: a wrong wall clock. CLOCK_OFF seconds are added to what is read; waits until a moment of it are corrected,
   so that only the clock is wrong and no wait is. Monotonic clocks are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define WALL(clock) ((clock) == CLOCK_REALTIME || (clock) == CLOCK_REALTIME_COARSE)

static long off(void) {
  const char *told = getenv("CLOCK_OFF");
  return told ? atol(told) : 0;
}

/* No machine has been up for 30 years: such a moment is one of the wall clock. */
static const struct timespec *corrected(const struct timespec *until, struct timespec *own) {
  if (!until || until->tv_sec < 1000000000) return until;
  *own = *until;
  own->tv_sec -= off();
  return own;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = syscall(SYS_clock_gettime, clock, now);
  if (code == 0 && WALL(clock)) now->tv_sec += off();
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec at;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &at);
  now->tv_sec = at.tv_sec;
  now->tv_usec = at.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *place) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  if (place) *place = at.tv_sec;
  return at.tv_sec;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
  struct timespec own;
  return REAL(clock_nanosleep)(clock, flags, flags & TIMER_ABSTIME ? corrected(until, &own) : until, left);
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
  struct timespec own;
  return REAL(sem_timedwait)(sem, corrected(until, &own));
}

int sem_clockwait(sem_t *restrict sem, clockid_t clock, const struct timespec *restrict until) {
  struct timespec own;
  return REAL(sem_clockwait)(sem, clock, corrected(until, &own));
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  struct timespec own;
  __typeof__(pthread_cond_timedwait) *real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!real) real = REAL(pthread_cond_timedwait); /* x86 has an older one besides */
  return real(cond, mutex, corrected(until, &own));
}

int pthread_cond_clockwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, clockid_t clock,
                           const struct timespec *restrict until) {
  struct timespec own;
  return REAL(pthread_cond_clockwait)(cond, mutex, clock, corrected(until, &own));
}

/* absl, within gRPC, waits on futexes of its own. */
long syscall(long number, ...) {
  static __typeof__(syscall) *real;
  long a[6];
  struct timespec own;
  va_list rest;
  va_start(rest, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
  va_end(rest);
  if (!real) real = REAL(syscall);
  if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET)
    a[3] = (long)corrected((const struct timespec *)a[3], &own);
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
