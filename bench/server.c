/* A static HTTP server for the remote benchmarks: one epoll loop that answers every POST with the same bytes.

   server PORT [LATENCY_MS]      GET /count answers how many POSTs came; GET /peak R answers the most in any 60 s.
   With a latency, an answer is sent that long after its request was read whole; answers keep their order. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS 65536
#define BUFFER 65536
#define QUEUE (1 << 20)

static const char BODY[] =
    "{\"id\":\"c\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"static\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\"The answer is 42.\"},\"finish_reason\":\"stop\"}],"
    "\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":6,\"total_tokens\":26}}";

typedef struct { char *data; int used; unsigned life; } Connection;
typedef struct { int fd; unsigned life; double due; } Late;

static Connection connections[CONNECTIONS];
static Late late[QUEUE];
static unsigned head, tail;
static double *stamps;
static long count, room;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void answer(int fd, const char *body) {
    char out[1024];
    int n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                     strlen(body), body);
    if (write(fd, out, n) < 0) { /* the client is gone */ }
}

static void statistics(int fd) {
    char body[128];
    long most = 0, from = 0;
    for (long to = 0; to < count; to++) {
        while (stamps[to] - stamps[from] >= 60.0) from++;
        if (to - from + 1 > most) most = to - from + 1;
    }
    snprintf(body, sizeof body, "{\"count\":%ld,\"peak_60s\":%ld,\"span_s\":%.3f}", count, most,
             count ? stamps[count - 1] - stamps[0] : 0.0);
    answer(fd, body);
}

/* Takes whole requests from the front of a connection's buffer. */
static void serve(int fd, double latency) {
    Connection *c = &connections[fd];
    for (;;) {
        c->data[c->used] = 0;
        char *end = strstr(c->data, "\r\n\r\n");
        if (!end) return;
        char *length = strcasestr(c->data, "content-length:");
        int body = length && length < end ? atoi(length + 15) : 0, whole = end + 4 - c->data + body;
        if (c->used < whole) return;
        int post = c->data[0] == 'P';
        memmove(c->data, c->data + whole, c->used - whole);
        c->used -= whole;
        if (!post) { statistics(fd); continue; }
        if (count == room) stamps = realloc(stamps, (room = room ? 2 * room : 1 << 16) * sizeof *stamps);
        stamps[count++] = now();
        if (latency > 0) late[tail++ % QUEUE] = (Late){fd, c->life, now() + latency};
        else answer(fd, BODY);
    }
}

int main(int argc, char **argv) {
    int port = atoi(argv[1]);
    double latency = argc > 2 ? atof(argv[2]) / 1000 : 0;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return perror("bind"), 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[1024];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    socklen_t size = sizeof address;
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int wait = head == tail ? -1 : 1;
        int n = epoll_wait(epoll, events, 1024, wait);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (client < 0) continue;
                if (client >= CONNECTIONS) { close(client); continue; }
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                Connection *c = &connections[client];
                if (!c->data) c->data = malloc(BUFFER + 1);
                c->used = 0;
                c->life++;
                event.data.fd = client;
                epoll_ctl(epoll, EPOLL_CTL_ADD, client, &event);
                continue;
            }
            Connection *c = &connections[fd];
            int got = read(fd, c->data + c->used, BUFFER - c->used);
            if (got > 0) { c->used += got; serve(fd, latency); }
            else if (got == 0 || errno != EAGAIN) { c->life++; close(fd); }
        }
        double t = head == tail ? 0 : now();
        while (head != tail && late[head % QUEUE].due <= t) {
            Late *l = &late[head++ % QUEUE];
            if (connections[l->fd].life == l->life) answer(l->fd, BODY);
        }
    }
}
