/* Walks over lists of tensors, for tritopt/engine/walk.py, which says what each function does and has it in Python as well. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

/* torch's C interface for compiled code (torch/csrc/inductor/aoti_torch/c/shim.h). A handle points to a tensor, which is
   one pointer. Functions return 0, or another number where torch raised. */
typedef int32_t (*get_number_fn)(void *handle, int32_t *out);
typedef int32_t (*get_size_fn)(void *handle, int64_t *out);
typedef int32_t (*get_sizes_fn)(void *handle, int64_t **out);
typedef int32_t (*get_address_fn)(void *handle, void **out);
/* Functions of const at::Tensor & for which that interface has nothing. at::native::is_neg: whether values are those in
   memory, negated. at::native::is_inference: whether there is no version. torch::autograd::impl::bump_version raises then. */
typedef _Bool (*is_fn)(void *handle);
typedef void (*bump_version_fn)(void *handle);
/* c10::TensorImpl::grad, of which p.grad makes a Python object. */
typedef void *(*grad_fn)(void *impl);

static struct {
  get_number_fn dtype, layout;
  get_size_fn dim;
  get_sizes_fn sizes, strides;
  get_address_fn data_ptr;
  is_fn is_neg, is_inference;
  bump_version_fn bump_version;
  grad_fn grad;
  void *undefined; /* implementation of the tensor that a parameter without a gradient has */
  int32_t strided;
} torch;

static struct {
  PyTypeObject *tensor, *parameter;
  PyObject *grad_name, *local_name;
} classes;

/* The beginning of a Python tensor (struct THPVariable of torch/csrc/autograd/python_variable.h): its C++ tensor is one
   pointer. `_cdata` says the same number, in 50 ns in place of 1; walk.py compares them before it uses this. */
typedef struct {
  PyObject_HEAD void *impl;
} python_tensor;

static inline void *impl_of(PyObject *tensor) {
  if (Py_TYPE(tensor) != classes.parameter && !PyObject_TypeCheck(tensor, classes.tensor))
    return PyErr_Format(PyExc_TypeError, "not a tensor: %R", (PyObject *)Py_TYPE(tensor));
  void *impl = ((python_tensor *)tensor)->impl;
  if (!impl) PyErr_SetString(PyExc_ValueError, "a tensor without an implementation");
  return impl;
}

/* Tensors lie scattered, and what a training step does between two steps of the optimizer has pushed them out of the
   caches: objects that come `FAR` places later, and tensors that come `NEAR` places later, are asked for in advance. */
enum { NEAR = 4, FAR = 8, LINE = 64, LINES_OF_TENSOR = 3 };

static inline void fetch_tensor(const void *impl) {
  for (int i = 0; i < LINES_OF_TENSOR; i++) __builtin_prefetch((const char *)impl + i * LINE);
}

static inline void fetch_ahead(PyObject *list, Py_ssize_t i) {
  Py_ssize_t n = PyList_GET_SIZE(list);
  if (i + FAR < n) __builtin_prefetch(PyList_GET_ITEM(list, i + FAR));
  if (i + NEAR >= n) return;
  PyObject *item = PyList_GET_ITEM(list, i + NEAR);
  if (Py_TYPE(item) == classes.parameter || Py_TYPE(item) == classes.tensor)
    fetch_tensor(((python_tensor *)item)->impl);
}

static PyObject *implementation(PyObject *self, PyObject *tensor) {
  void *impl = classes.tensor->tp_basicsize < (Py_ssize_t)sizeof(python_tensor) ? NULL : impl_of(tensor);
  return PyErr_Occurred() ? NULL : PyLong_FromVoidPtr(impl);
}

static PyObject *bind(PyObject *self, PyObject *args) {
  unsigned long long f[11];
  int strided;
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(args, "O!O!(KKKKKKKKKKK)i", &PyType_Type, &tensor, &PyType_Type, &parameter, f, f + 1, f + 2,
                        f + 3, f + 4, f + 5, f + 6, f + 7, f + 8, f + 9, f + 10, &strided))
    return NULL;
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  classes.tensor = (PyTypeObject *)tensor;
  classes.parameter = (PyTypeObject *)parameter;
  torch.dtype = (get_number_fn)(uintptr_t)f[0];
  torch.layout = (get_number_fn)(uintptr_t)f[1];
  torch.dim = (get_size_fn)(uintptr_t)f[2];
  torch.sizes = (get_sizes_fn)(uintptr_t)f[3];
  torch.strides = (get_sizes_fn)(uintptr_t)f[4];
  torch.data_ptr = (get_address_fn)(uintptr_t)f[5];
  torch.is_neg = (is_fn)(uintptr_t)f[6];
  torch.is_inference = (is_fn)(uintptr_t)f[7];
  torch.bump_version = (bump_version_fn)(uintptr_t)f[8];
  torch.grad = (grad_fn)(uintptr_t)f[9];
  torch.undefined = (void *)(uintptr_t)f[10];
  torch.strided = strided;
  Py_RETURN_NONE;
}

/* The buffer of an int64 array with room for n numbers. */
static int64_t *room(PyObject *array, Py_buffer *view, Py_ssize_t n) {
  if (PyObject_GetBuffer(array, view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return NULL;
  if (view->len == n * (Py_ssize_t)sizeof(int64_t)) return view->buf;
  PyErr_Format(PyExc_ValueError, "out has %zd bytes, not those of %zd int64", view->len, n);
  PyBuffer_Release(view);
  return NULL;
}

/* ANOTHER: a tensor that nothing is known of. LIKE: it should be like one that was described. SAME: it is the object that
   was described, which is strided still, or has no address. */
enum known { ANOTHER, LIKE, SAME };

/* Of one tensor: its address, and up to `n_free` words that say how it lies in memory. They are written, or if something
   is known of it compared with what stands there. Returns their number; 0 if it is not as expected, -1 after an error. */
static inline Py_ssize_t describe_handle(void *handle, int64_t *address, int64_t *to, Py_ssize_t n_free,
                                         enum known known) {
  void *data = NULL;
  int32_t dtype, layout;
  int64_t dim, *sizes, *strides;
  if (known != SAME && (torch.layout(handle, &layout) || layout != torch.strided)) return 0;
  if (torch.is_neg(handle)) return 0;
  if (torch.dtype(handle, &dtype) || torch.dim(handle, &dim) || torch.sizes(handle, &sizes) ||
      torch.strides(handle, &strides) || torch.data_ptr(handle, &data))
    return 0;
  if (n_free < 2 + 2 * dim) return 0;
  int64_t n_elements = 1;
  for (int64_t i = 0; i < dim; i++) n_elements *= sizes[i];
  if (!data && n_elements) return 0; /* all its values are 0, and lie nowhere */
  size_t n_bytes = dim * sizeof(int64_t);
  *address = (int64_t)(uintptr_t)data;
  if (known)
    return to[0] == dtype && to[1] == dim && !memcmp(to + 2, sizes, n_bytes) && !memcmp(to + 2 + dim, strides, n_bytes)
               ? 2 + 2 * dim
               : 0;
  to[0] = dtype;
  to[1] = dim;
  memcpy(to + 2, sizes, n_bytes);
  memcpy(to + 2 + dim, strides, n_bytes);
  return 2 + 2 * dim;
}

/* The same of no tensor, where there is no gradient. */
static inline Py_ssize_t describe_none(int64_t *address, int64_t *to, Py_ssize_t n_free, enum known known) {
  if (n_free < 2 || (known && (to[0] != -1 || to[1] != -1))) return 0;
  *address = -1;
  if (!known) to[0] = to[1] = -1;
  return 2;
}

/* The same of a Python tensor, or None. */
static inline Py_ssize_t describe_one(PyObject *tensor, int64_t *address, int64_t *to, Py_ssize_t n_free,
                                      enum known known) {
  if (tensor == Py_None) return describe_none(address, to, n_free, known);
  void *impl = impl_of(tensor);
  return impl ? describe_handle(&impl, address, to, n_free, known) : -1;
}

/* The same of a parameter's gradient. */
static inline Py_ssize_t describe_gradient(PyObject *param, int64_t *address, int64_t *to, Py_ssize_t n_free) {
  if (Py_TYPE(param) == classes.parameter || Py_TYPE(param) == classes.tensor) {
    void *impl = impl_of(param);
    if (!impl) return -1;
    void **grad = torch.grad(impl);
    return *grad == torch.undefined ? describe_none(address, to, n_free, LIKE)
                                    : describe_handle(grad, address, to, n_free, LIKE);
  }
  PyObject *grad = PyObject_GetAttr(param, classes.grad_name); /* another class may have its own */
  Py_ssize_t found = grad ? describe_one(grad, address, to, n_free, LIKE) : -1;
  Py_XDECREF(grad);
  return found;
}

static PyObject *describe(PyObject *self, PyObject *args) {
  PyObject *tensors, *array;
  Py_ssize_t n_words, found = 1, used = 0;
  Py_buffer view;
  if (!PyArg_ParseTuple(args, "O!On", &PyList_Type, &tensors, &array, &n_words)) return NULL;
  Py_ssize_t n = PyList_GET_SIZE(tensors);
  int64_t *out = room(array, &view, n);
  PyObject *said = out ? PyBytes_FromStringAndSize(NULL, n_words * (Py_ssize_t)sizeof(int64_t)) : NULL;
  int64_t *words = said ? (int64_t *)(void *)PyBytes_AS_STRING(said) : NULL;
  for (Py_ssize_t i = 0; said && i < n && found > 0; i++) {
    found = describe_one(PyList_GET_ITEM(tensors, i), out + i, words + used, n_words - used, ANOTHER);
    used += found > 0 ? found : 0;
  }
  if (out) PyBuffer_Release(&view);
  if (!said || (found > 0 && used == n_words)) return said;
  Py_DECREF(said);
  if (found < 0) return NULL;
  Py_RETURN_NONE;
}

static PyObject *gradients_are(PyObject *self, PyObject *args) {
  PyObject *params, *said, *array;
  Py_ssize_t found = 1, used = 0;
  Py_buffer view;
  if (!PyArg_ParseTuple(args, "O!SO", &PyList_Type, &params, &said, &array)) return NULL;
  Py_ssize_t n = PyList_GET_SIZE(params), n_words = PyBytes_GET_SIZE(said) / (Py_ssize_t)sizeof(int64_t);
  int64_t *words = (int64_t *)(void *)PyBytes_AS_STRING(said), *out = room(array, &view, n);
  if (!out) return NULL;
  for (Py_ssize_t i = 0; i < n && found > 0; i++) {
    fetch_ahead(params, i);
    found = describe_gradient(PyList_GET_ITEM(params, i), out + i, words + used, n_words - used);
    used += found > 0 ? found : 0;
  }
  PyBuffer_Release(&view);
  return found < 0 ? NULL : PyBool_FromLong(found > 0 && used == n_words);
}

static PyObject *are(PyObject *self, PyObject *args) {
  PyObject *tensors, *said, *array;
  Py_buffer view;
  if (!PyArg_ParseTuple(args, "O!SO", &PyList_Type, &tensors, &said, &array)) return NULL;
  Py_ssize_t n = PyList_GET_SIZE(tensors), n_words = PyBytes_GET_SIZE(said) / (Py_ssize_t)sizeof(int64_t);
  Py_ssize_t i = 0, found = 1, used = 0;
  int64_t now, *words = (int64_t *)(void *)PyBytes_AS_STRING(said), *at = room(array, &view, n);
  if (!at) return NULL;
  for (; i < n; i++) {
    fetch_ahead(tensors, i);
    found = describe_one(PyList_GET_ITEM(tensors, i), &now, words + used, n_words - used, SAME);
    if (found <= 0 || at[i] != now) break;
    used += found;
  }
  PyBuffer_Release(&view);
  return found < 0 ? NULL : PyBool_FromLong(i == n && used == n_words);
}

static PyObject *mark_written(PyObject *self, PyObject *tensors) {
  if (!PyList_Check(tensors)) return PyErr_Format(PyExc_TypeError, "not a list: %R", (PyObject *)Py_TYPE(tensors));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); i++) {
    void *impl = impl_of(PyList_GET_ITEM(tensors, i));
    if (!impl) return NULL;
    if (!torch.is_inference(&impl)) torch.bump_version(&impl);
  }
  Py_RETURN_NONE;
}

static int are_same(PyObject *a, PyObject *b) {
  Py_ssize_t n = PyList_GET_SIZE(a);
  if (n != PyList_GET_SIZE(b)) return 0;
  for (Py_ssize_t i = 0; i < n; i++)
    if (PyList_GET_ITEM(a, i) != PyList_GET_ITEM(b, i)) return 0;
  return 1;
}

static PyObject *same(PyObject *self, PyObject *args) {
  PyObject *a, *b;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &a, &PyList_Type, &b)) return NULL;
  return PyBool_FromLong(are_same(a, b));
}

static PyObject *hold(PyObject *self, PyObject *args) {
  PyObject *lists, *copies;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &lists, &PyList_Type, &copies)) return NULL;
  Py_ssize_t n = PyList_GET_SIZE(lists);
  if (n != PyList_GET_SIZE(copies)) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject *list = PyList_GET_ITEM(lists, i), *copy = PyList_GET_ITEM(copies, i);
    if (!PyList_Check(list) || !PyList_Check(copy) || !are_same(list, copy)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

static PyObject *changed(PyObject *self, PyObject *args) {
  PyObject *dicts, *before;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &dicts, &PyList_Type, &before)) return NULL;
  Py_ssize_t n = PyList_GET_SIZE(dicts);
  if (n != PyList_GET_SIZE(before)) return PyErr_Format(PyExc_ValueError, "as many dicts as tuples");
  PyObject *out = PyList_New(0);
  for (Py_ssize_t i = 0; out && i < n; i++) {
    PyObject *dict = PyList_GET_ITEM(dicts, i), *values = PyList_GET_ITEM(before, i), *key, *value;
    if (!PyDict_Check(dict) || !PyTuple_Check(values)) {
      PyErr_Format(PyExc_TypeError, "lists of dicts and of tuples");
      Py_CLEAR(out);
      break;
    }
    Py_ssize_t at = 0, k = 0;
    int is_same = 2 * PyDict_GET_SIZE(dict) == PyTuple_GET_SIZE(values);
    for (; is_same && PyDict_Next(dict, &at, &key, &value); k += 2)
      is_same = key == PyTuple_GET_ITEM(values, k) && value == PyTuple_GET_ITEM(values, k + 1);
    if (is_same) continue;
    PyObject *index = PyLong_FromSsize_t(i);
    if (!index || PyList_Append(out, index) < 0) Py_CLEAR(out);
    Py_XDECREF(index);
  }
  return out;
}

/* Of a DTensor, the tensor that this process has. A new reference, which others of its kind lack: NULL for them. */
static inline PyObject *part_of(PyObject *value) {
  PyTypeObject *type = Py_TYPE(value);
  if (type == classes.tensor || type == classes.parameter) return NULL;
  PyObject *part = PyObject_GetAttr(value, classes.local_name);
  if (!part) PyErr_Clear();
  return part;
}

/* A row of the table of `known_states`: of a dict its identity, the number of its values, and where in words the
   description of its tensors begins; of a value its identity, its key's, its tensor's address, -1 where that does not
   matter, and its tensor. */
typedef struct {
  int64_t object, key_or_n, address_or_start, tensor;
} row;

/* Whether a dict has the keys and values that `rows` tell of, where they were and as they were. end: that of the table.
   1, 0, or -1 after an error. */
static int values_are(PyObject *dict, const row *rows, const row *end, int64_t n, int64_t *words, Py_ssize_t n_words) {
  Py_ssize_t at = 0, used = 0;
  if (PyDict_GET_SIZE(dict) != n) return 0;
  for (; n > 0; n--, rows++) {
    PyObject *key, *value;
    int64_t now;
    if (end - rows > FAR) {
      __builtin_prefetch((void *)(uintptr_t)rows[FAR].object);
      fetch_tensor((void *)(uintptr_t)rows[NEAR].tensor);
    }
    if (!PyDict_Next(dict, &at, &key, &value)) return 0;
    if ((int64_t)(uintptr_t)value != rows->object || (int64_t)(uintptr_t)key != rows->key_or_n) return 0;
    if (rows->address_or_start == -1) continue;
    PyObject *part = part_of(value);
    Py_ssize_t found = describe_one(part ? part : value, &now, words + used, n_words - used, part ? LIKE : SAME);
    Py_XDECREF(part);
    if (found <= 0) return PyErr_Occurred() ? -1 : 0;
    if (now != rows->address_or_start) return 0;
    used += found;
  }
  return 1;
}

static PyObject *states_are(PyObject *self, PyObject *args) {
  PyObject *states, *owners, *said, *array, *owner, *dict;
  Py_buffer view;
  if (!PyArg_ParseTuple(args, "OO!SO", &states, &PyList_Type, &owners, &said, &array)) return NULL;
  if (PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS) < 0) return NULL;
  Py_ssize_t n_words = PyBytes_GET_SIZE(said) / (Py_ssize_t)sizeof(int64_t), n = PyList_GET_SIZE(owners), at = 0;
  const row *rows = view.buf, *end = rows + view.len / (Py_ssize_t)sizeof(row);
  int64_t *words = (int64_t *)(void *)PyBytes_AS_STRING(said);
  int found = PyDict_Check(states) && PyDict_GET_SIZE(states) == n;
  for (Py_ssize_t i = 0; i < n && found > 0; i++) {
    int64_t n_values = rows < end ? rows->key_or_n : -1, start = rows < end ? rows->address_or_start : -1;
    if (n_values < 0 || end - rows <= n_values || start < 0 || start > n_words ||
        !PyDict_Next(states, &at, &owner, &dict) || i >= PyList_GET_SIZE(owners) ||
        owner != PyList_GET_ITEM(owners, i) || (int64_t)(uintptr_t)dict != rows->object || !PyDict_Check(dict)) {
      found = 0;
      break;
    }
    Py_INCREF(dict); /* a value's attribute may be a function, which may do anything */
    found = values_are(dict, rows + 1, end, n_values, words + start, n_words - start);
    Py_DECREF(dict);
    rows += 1 + n_values;
  }
  PyBuffer_Release(&view);
  return found < 0 ? NULL : PyBool_FromLong(found > 0 && rows == end);
}

static PyMethodDef methods[] = {{"bind", bind, METH_VARARGS, NULL},
                                {"implementation", implementation, METH_O, NULL},
                                {"describe", describe, METH_VARARGS, NULL},
                                {"gradients_are", gradients_are, METH_VARARGS, NULL},
                                {"are", are, METH_VARARGS, NULL},
                                {"mark_written", mark_written, METH_O, NULL},
                                {"same", same, METH_VARARGS, NULL},
                                {"hold", hold, METH_VARARGS, NULL},
                                {"changed", changed, METH_VARARGS, NULL},
                                {"states_are", states_are, METH_VARARGS, NULL},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_walk", NULL, -1, methods, NULL, NULL, NULL, NULL};

/* SHA-256 of this file, as whoever compiles it says: a binary of another source is not used. */
#ifndef TRITOPT_WALK_SOURCE
#define TRITOPT_WALK_SOURCE "unknown"
#endif

PyMODINIT_FUNC PyInit__walk(void) {
  classes.grad_name = PyUnicode_InternFromString("grad");
  classes.local_name = PyUnicode_InternFromString("_local_tensor");
  if (!classes.grad_name || !classes.local_name) return NULL;
  PyObject *made = PyModule_Create(&module);
  if (made && PyModule_AddStringConstant(made, "source", TRITOPT_WALK_SOURCE) < 0) Py_CLEAR(made);
  return made;
}
