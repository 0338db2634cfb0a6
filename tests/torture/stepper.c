/* One operation of the built extension, instruction by instruction (x86-64, ptrace).
 *
 * A Python extension, compiled by walking.py, which gives it the text of the
 * extension under test (`own`) and that of the libraries it calls (`called`).
 * Code of `own`, and code of `called` that was entered from there, is *inside*;
 * the interpreter is run through.  A *stop* is a moment before an instruction
 * inside.  One that repeats itself (rep movsb) has three: before it, after its
 * first turn, and when it is through, which is before the next.
 *
 * trace() steps through a whole operation and writes its stops down: address,
 * and how often the address has come by, in `own` only, where no other
 * thread comes by.  go() takes another process, which does the same, to one of them
 * quickly: by a breakpoint to the nearest stop in `own` before it, and the
 * rest in single steps.  It leaves the process there, to be killed or released.
 *
 * All calls for one process are made by the thread that forked it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_RANGES 16
#define MOST_STOPS (1 << 20)
#define BREAKPOINT 0xcc
#define SYSCALL_INSTRUCTION 0x050f

typedef struct {
    uint64_t low, high;
    uint32_t *hits; /* of `own`: how often each byte was the next instruction */
} range;

typedef struct {
    pid_t pid;
    int status;
    uint64_t at;
    int turning; /* the last step did not leave a repeating instruction */
} walker;

enum { ENDED = 0, STOPPED = 1, FAILED = -1 };

static range own[MOST_RANGES], called[MOST_RANGES];
static int own_count, called_count;

static range *find(range *ranges, int count, uint64_t at)
{
    for (int i = 0; i < count; i++)
        if (at - ranges[i].low < ranges[i].high - ranges[i].low)
            return &ranges[i];
    return NULL;
}

/* ---- one process under ptrace ------------------------------------------------- */

/* Until it stops with SIGTRAP or ends; other signals are passed on. */
static int resume(walker *w, int request)
{
    long signal = 0;
    do {
        if (ptrace(request, w->pid, NULL, (void *)signal) != 0)
            return FAILED;
        while (waitpid(w->pid, &w->status, __WALL) < 0)
            if (errno != EINTR)
                return FAILED;
        if (!WIFSTOPPED(w->status))
            return ENDED;
        signal = WSTOPSIG(w->status);
    } while (signal != SIGTRAP);
    errno = 0;
    w->at = (uint64_t)ptrace(PTRACE_PEEKUSER, w->pid, offsetof(struct user, regs.rip), NULL);
    return errno == 0 ? STOPPED : FAILED;
}

/* Wait for its traceme(); it will not outlive this process. */
static int begin(walker *w, pid_t pid)
{
    w->pid = pid;
    w->turning = 0;
    while (waitpid(pid, &w->status, __WALL) < 0)
        if (errno != EINTR)
            return FAILED;
    if (!WIFSTOPPED(w->status))
        return ENDED;
    if (ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *)PTRACE_O_EXITKILL) != 0)
        return FAILED;
    errno = 0;
    w->at = (uint64_t)ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user, regs.rip), NULL);
    return errno == 0 ? STOPPED : FAILED;
}

static int run_to(walker *w, uint64_t address)
{
    errno = 0;
    long word = ptrace(PTRACE_PEEKTEXT, w->pid, address, NULL);
    if (errno != 0 || ptrace(PTRACE_POKETEXT, w->pid, address, (word & ~0xffL) | BREAKPOINT) != 0)
        return FAILED;
    int result = resume(w, PTRACE_CONT);
    if (result != STOPPED)
        return result;
    if (w->at != address + 1 /* the breakpoint was executed */
        || ptrace(PTRACE_POKETEXT, w->pid, address, word) != 0
        || ptrace(PTRACE_POKEUSER, w->pid, offsetof(struct user, regs.rip), address) != 0)
        return FAILED;
    w->at = address;
    w->turning = 0;
    return STOPPED;
}

/* The length of a string instruction with a rep prefix, or 0. */
static int repeats(pid_t pid, uint64_t at)
{
    long word = ptrace(PTRACE_PEEKTEXT, pid, at, NULL);
    int low = (int)(word & 0xff);
    if (low != 0xf3 && low != 0xf2)
        return 0;
    int i = ((word >> 8) & 0xf0) == 0x40 ? 2 : 1; /* REX */
    low = (int)((word >> (8 * i)) & 0xff);
    return (low >= 0xa4 && low <= 0xa7) || (low >= 0xaa && low <= 0xaf) ? i + 1 : 0;
}

static int step(walker *w)
{
    uint64_t was = w->at;
    int length = w->turning ? repeats(w->pid, was) : 0;
    int result = length ? run_to(w, was + length) : resume(w, PTRACE_SINGLESTEP);
    w->turning = result == STOPPED && w->at == was;
    return result;
}

/* Is the next instruction a FUTEX_WAIT? */
static int will_sleep(walker *w)
{
    if ((ptrace(PTRACE_PEEKTEXT, w->pid, w->at, NULL) & 0xffff) != SYSCALL_INSTRUCTION)
        return 0;
    long number = ptrace(PTRACE_PEEKUSER, w->pid, offsetof(struct user, regs.rax), NULL);
    long operation = ptrace(PTRACE_PEEKUSER, w->pid, offsetof(struct user, regs.rsi), NULL);
    return number == SYS_futex && (operation & 127) == 0;
}

static PyObject *failed(walker *w, int error)
{
    kill(w->pid, SIGKILL);
    waitpid(w->pid, &w->status, __WALL);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* ---- for Python ------------------------------------------------------------------ */

static int read_ranges(PyObject *given, range *ranges, int *count, int counted)
{
    Py_ssize_t n = PySequence_Size(given);
    if (n < 0 || n > MOST_RANGES) {
        PyErr_Format(PyExc_ValueError, "%zd ranges", n);
        return -1;
    }
    for (*count = 0; *count < n; ++*count) {
        range *r = &ranges[*count];
        PyObject *pair = PySequence_GetItem(given, *count);
        int read = pair != NULL && PyArg_ParseTuple(pair, "KK", &r->low, &r->high);
        Py_XDECREF(pair);
        if (!read)
            return -1;
        free(r->hits);
        r->hits = counted ? calloc(r->high - r->low, sizeof(uint32_t)) : NULL;
        if (counted && r->hits == NULL) {
            PyErr_NoMemory();
            return -1;
        }
    }
    return 0;
}

static PyObject *set_text(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *first, *second;
    if (!PyArg_ParseTuple(args, "OO", &first, &second)
        || read_ranges(first, own, &own_count, 1) != 0 || read_ranges(second, called, &called_count, 0) != 0)
        return NULL;
    Py_RETURN_NONE;
}

/* In the victim: stop here, for trace() or go(). */
static PyObject *traceme(PyObject *self, PyObject *nothing)
{
    (void)self, (void)nothing;
    /* From here on no alarm ends it: one that is stopped, by a tracer that died before it
     * asked for PTRACE_O_EXITKILL, would stand for ever, and hold its pipes open. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    raise(SIGSTOP);
    Py_RETURN_NONE;
}

static PyObject *trace(PyObject *self, PyObject *args)
{
    (void)self;
    static uint64_t addresses[MOST_STOPS];
    static uint32_t hits[MOST_STOPS]; /* 0 outside of `own`, and for a second turn */
    static unsigned char sleeps[MOST_STOPS];
    int count = 0, inside = 0, pid, result, error = 0;
    walker w;
    if (!PyArg_ParseTuple(args, "i", &pid))
        return NULL;
    for (int i = 0; i < own_count; i++)
        for (uint64_t at = 0; at < own[i].high - own[i].low; at++)
            own[i].hits[at] = 0;
    Py_BEGIN_ALLOW_THREADS
    result = begin(&w, pid);
    while (result == STOPPED && (result = step(&w)) == STOPPED) {
        range *home = find(own, own_count, w.at);
        inside = home != NULL || (inside && find(called, called_count, w.at) != NULL);
        if (!inside)
            continue;
        if (count == MOST_STOPS) {
            result = FAILED;
            errno = ENOSPC;
            break;
        }
        addresses[count] = w.at;
        hits[count] = home == NULL || w.turning ? 0 : ++home->hits[w.at - home->low];
        sleeps[count++] = (unsigned char)will_sleep(&w);
    }
    error = errno;
    Py_END_ALLOW_THREADS
    if (result == FAILED)
        return failed(&w, error);
    PyObject *stops = PyList_New(count);
    for (int i = 0; stops != NULL && i < count; i++) {
        PyObject *stop = Py_BuildValue("KIO", (unsigned long long)addresses[i], hits[i], sleeps[i] ? Py_True : Py_False);
        if (stop == NULL)
            Py_CLEAR(stops);
        else
            PyList_SET_ITEM(stops, i, stop);
    }
    return stops == NULL ? NULL : Py_BuildValue("iN", w.status, stops);
}

static PyObject *go(PyObject *self, PyObject *args)
{
    (void)self;
    unsigned long long address;
    int pid, hits, steps, result, error = 0;
    walker w;
    if (!PyArg_ParseTuple(args, "iKii", &pid, &address, &hits, &steps))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = begin(&w, pid);
    while (result == STOPPED && hits-- > 0) {
        result = run_to(&w, address);
        while (result == STOPPED && hits > 0 && w.at == address)
            result = step(&w);
    }
    while (result == STOPPED && steps-- > 0)
        result = step(&w);
    error = errno;
    Py_END_ALLOW_THREADS
    if (result == FAILED)
        return failed(&w, error);
    return Py_BuildValue("OiK", result == STOPPED ? Py_True : Py_False, w.status, (unsigned long long)w.at);
}

/* Let a stopped process run on by itself. */
static PyObject *release(PyObject *self, PyObject *args)
{
    (void)self;
    int pid;
    if (!PyArg_ParseTuple(args, "i", &pid))
        return NULL;
    if (ptrace(PTRACE_DETACH, pid, NULL, NULL) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"set_text", set_text, METH_VARARGS, "set_text(own, called): pairs (low, high) of addresses."},
    {"traceme", traceme, METH_NOARGS, "In the victim: stop, and be walked from here."},
    {"trace", trace, METH_VARARGS, "trace(pid) -> (status, [(address, hits, sleeps)]): step to the end."},
    {"go", go, METH_VARARGS,
     "go(pid, address, hits, steps) -> (stopped, status, address): so often to an address, and so many steps on."},
    {"release", release, METH_VARARGS, "release(pid): let it run on."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "stepper", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_stepper(void) { return PyModule_Create(&module); }
