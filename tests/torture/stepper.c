/* One operation of the built extension, instruction by instruction (x86-64, ptrace).
 *
 * A Python extension, compiled by test_every_instruction.py, which gives it
 * the text of the extension and of the libraries that it calls.  Code there is
 * *inside* and is stepped; the interpreter is run through, up to the next of
 * the `entries` at which an earlier walk came inside.
 *
 * A victim that traceme() stopped is killed where the n-th stop inside would
 * be: before its n-th instruction, after all that came before.  An instruction
 * that repeats itself (rep movsb) is seen before, after its first turn, and
 * when it is through.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_RANGES 32
#define MOST_ENTRIES 512
#define BREAKPOINT 0xcc

typedef struct {
    uint64_t low, high;
} range;

static range inside[MOST_RANGES];
static int inside_count;

static int is_inside(uint64_t at)
{
    for (int i = 0; i < inside_count; i++)
        if (at - inside[i].low < inside[i].high - inside[i].low)
            return 1;
    return 0;
}

static PyObject *set_inside(PyObject *self, PyObject *ranges)
{
    (void)self;
    Py_ssize_t count = PySequence_Size(ranges);
    if (count < 0 || count > MOST_RANGES)
        return PyErr_Format(PyExc_ValueError, "%zd ranges", count);
    inside_count = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PySequence_GetItem(ranges, i);
        int read = pair != NULL && PyArg_ParseTuple(pair, "KK", &inside[i].low, &inside[i].high);
        Py_XDECREF(pair);
        if (!read)
            return NULL;
        inside_count++;
    }
    Py_RETURN_NONE;
}

/* In the victim: stop here, for the tracer to go on with walk(). */
static PyObject *traceme(PyObject *self, PyObject *nothing)
{
    (void)self, (void)nothing;
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    raise(SIGSTOP);
    Py_RETURN_NONE;
}

static int wait_stop(pid_t pid, int *status)
{
    while (waitpid(pid, status, __WALL) < 0)
        if (errno != EINTR)
            return -1;
    return WIFSTOPPED(*status);
}

/* Exchange the byte at each entry for a breakpoint, or back. */
static int set_breakpoints(pid_t pid, const uint64_t *entries, unsigned char *saved, int count, int on)
{
    for (int i = 0; i < count; i++) {
        errno = 0;
        long word = ptrace(PTRACE_PEEKTEXT, pid, entries[i], NULL);
        if (errno != 0)
            return -1;
        if (on)
            saved[i] = (unsigned char)word;
        word = (word & ~0xffL) | (on ? BREAKPOINT : saved[i]);
        if (ptrace(PTRACE_POKETEXT, pid, entries[i], word) != 0)
            return -1;
    }
    return 0;
}

/* The length of a string instruction with a rep prefix, or 0. */
static int repeats(pid_t pid, uint64_t at)
{
    long word = ptrace(PTRACE_PEEKTEXT, pid, at, NULL);
    int i = 0, low = (int)(word & 0xff);
    if (low != 0xf3 && low != 0xf2)
        return 0;
    i = ((word >> 8) & 0xf0) == 0x40 ? 2 : 1; /* REX */
    low = (int)((word >> (8 * i)) & 0xff);
    return (low >= 0xa4 && low <= 0xa7) || (low >= 0xaa && low <= 0xaf) ? i + 1 : 0;
}

/* walk(pid, kill_at, entries) -> (stops inside, killed, status, address, entries met)
 *
 * kill_at -1 kills nowhere.  Without entries everything is stepped and the
 * entries are found out. */
static PyObject *walk(PyObject *self, PyObject *args)
{
    (void)self;
    int pid, status, error = 0, killed = 0;
    long long kill_at, stops = 0;
    PyObject *given;
    uint64_t entries[MOST_ENTRIES], at = 0, behind = 0;
    unsigned char saved[MOST_ENTRIES], saved_behind = 0;
    int count = 0, known, was_inside = 0;
    if (!PyArg_ParseTuple(args, "iLO", &pid, &kill_at, &given))
        return NULL;
    known = given != Py_None;
    if (known) {
        count = (int)PySequence_Size(given);
        if (count < 0 || count > MOST_ENTRIES)
            return PyErr_Format(PyExc_ValueError, "%d entries", count);
        for (int i = 0; i < count; i++) {
            PyObject *item = PySequence_GetItem(given, i);
            entries[i] = item == NULL ? 0 : PyLong_AsUnsignedLongLong(item);
            Py_XDECREF(item);
        }
        if (PyErr_Occurred())
            return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    int alive = wait_stop(pid, &status); /* of traceme() */
    if (alive > 0 && ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *)PTRACE_O_EXITKILL) != 0)
        error = errno;
    while (alive > 0 && error == 0) {
        int through = known && !was_inside, pass = 0;
        if ((through && set_breakpoints(pid, entries, saved, count, 1) != 0)
            || (behind != 0 && set_breakpoints(pid, &behind, &saved_behind, 1, 1) != 0)) {
            error = errno;
            break;
        }
        do {
            if (ptrace(through || behind != 0 ? PTRACE_CONT : PTRACE_SINGLESTEP, pid, NULL, (void *)(long)pass) != 0) {
                error = errno;
                break;
            }
            alive = wait_stop(pid, &status);
            pass = alive > 0 && WSTOPSIG(status) != SIGTRAP ? WSTOPSIG(status) : 0;
        } while (alive > 0 && pass != 0);
        if (error != 0 || alive <= 0)
            break;
        uint64_t was_at = at;
        at = (uint64_t)ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user, regs.rip), NULL);
        if (through || behind != 0) {
            at -= 1; /* the breakpoint was executed */
            if ((through ? set_breakpoints(pid, entries, saved, count, 0)
                         : set_breakpoints(pid, &behind, &saved_behind, 1, 0)) != 0
                || ptrace(PTRACE_POKEUSER, pid, offsetof(struct user, regs.rip), at) != 0) {
                error = errno;
                break;
            }
        }
        int again = !through && behind == 0 && at == was_at ? repeats(pid, at) : 0;
        behind = again ? at + again : 0;
        int now = is_inside(at);
        /* libraries called by the interpreter are none of our business */
        if (now && !was_inside && !known) {
            now = at - inside[0].low < inside[0].high - inside[0].low
                || (inside_count > 1 && at - inside[1].low < inside[1].high - inside[1].low)
                || (inside_count > 2 && at - inside[2].low < inside[2].high - inside[2].low);
            int seen = !now;
            for (int i = 0; i < count && !seen; i++)
                seen = entries[i] == at;
            if (!seen) {
                if (count == MOST_ENTRIES) {
                    error = ENOSPC;
                    break;
                }
                entries[count++] = at;
            }
        }
        was_inside = now;
        if (now && ++stops == kill_at) {
            kill(pid, SIGKILL);
            killed = 1;
            alive = wait_stop(pid, &status);
            break;
        }
    }
    if (error != 0) {
        kill(pid, SIGKILL);
        waitpid(pid, &status, __WALL);
    }
    Py_END_ALLOW_THREADS
    if (error != 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *met = PyList_New(count);
    for (int i = 0; met != NULL && i < count; i++)
        PyList_SET_ITEM(met, i, PyLong_FromUnsignedLongLong(entries[i]));
    return Py_BuildValue("LOiKN", stops, killed ? Py_True : Py_False, status, (unsigned long long)at, met);
}

static PyMethodDef methods[] = {
    {"set_inside", set_inside, METH_O, "Pairs (low, high); the first three are the extension's."},
    {"traceme", traceme, METH_NOARGS, "In the victim: stop, and be walked from here."},
    {"walk", walk, METH_VARARGS, "Walk a stopped victim, and kill it."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "stepper", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_stepper(void) { return PyModule_Create(&module); }
