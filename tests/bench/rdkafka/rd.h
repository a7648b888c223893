/* What librdkafka's rdkafka_performance.c uses of the library's private headers, so that it builds outside of its tree. */
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#define RD_UNUSED __attribute__((unused))
#define RD_NORETURN __attribute__((noreturn))
#define RD_MAX(a, b) ((a) > (b) ? (a) : (b))
#define RD_MIN(a, b) ((a) < (b) ? (a) : (b))
#define rd_snprintf snprintf
