"""What makes a job's samples, as a digest: jobs share batches only if it is shown that they would make the same ones.

A dataset, its collate function and what else takes part are walked through as pickle does (`__reduce_ex__`), and
hashed by value. So that equal things have equal digests in all processes, whatever their hash seeds and addresses,
sets are sorted, attributes taken by name, and what is shared or not makes no difference. Functions and classes are
hashed by their code, with defaults, closures, and the globals that the code names; those of installed packages by
name and version. Digests of parts are kept, with short values as they are, so that a difference can be named.

Nothing here fails or changes anything: what cannot be looked at makes the digest None, with the reason.
"""

from __future__ import annotations

import builtins
import ctypes
import dis
import functools
import importlib.util
import io
import json
import marshal
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from copyreg import dispatch_table
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from itertools import chain
from pathlib import Path, PosixPath, PurePath, PurePosixPath
from typing import Any, NamedTuple

from xxhash import xxh3_128

_CHUNK = 4096  # elements of a list that are hashed at once
_MOST_PLAIN = 1 << 20  # values in such a chunk, nested ones included
_VALUE = 60  # characters of a value that is shown as it is
_DEPTH = 4  # down to which parts are kept
_PARTS_BYTES = 12_000  # of all parts, since they travel in one packet
_FEW = 32  # elements of a container that are parts each

_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type(Ellipsis)))
_BOXES = frozenset((list, tuple, set, frozenset, dict))
# Of a class: what follows from the rest, differs from run to run, or says nothing about what it does.
_IGNORED = frozenset(
    (
        *("__dict__", "__weakref__", "__module__", "__qualname__", "__firstlineno__", "__match_args__"),
        *("__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__", "__static_attributes__"),
        *("__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__conditional_annotations__"),
    )
)
# Of a module: what importing it sets.
_IMPORTED = frozenset(
    (
        *("__name__", "__file__", "__cached__", "__path__", "__package__", "__spec__", "__loader__", "__builtins__"),
        *("__doc__", "__annotations__", "__annotate__", "__conditional_annotations__"),
    )
)
_ALL = frozenset(("globals", "eval", "exec"))  # code that calls them may use any of its globals
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_NUMBERS = frozenset("<>=@!?bBhHiIlLqQfdgn0123456789()[],:")  # what formats of memory without pointers are made of
_INSTALLED = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")})


class Identity(NamedTuple):
    """The digest, None if it cannot be told; digests or values of parts; and why it cannot be told."""

    digest: str | None
    parts: dict[str, str]
    unknown: str | None


def identify(**things: Any) -> Identity:
    """The identity of what makes a job's samples. Never raises but for KeyboardInterrupt."""
    walker = _Walker()
    whole = _hash(b"whole", [walker.digest(value, name) for name, value in things.items()])
    return Identity(whole.hex() if walker.unknown is None else None, _bounded(walker.parts), walker.unknown)


def _bounded(parts: dict[str, str]) -> dict[str, str]:
    """As many parts as may travel, those nearest to the top first."""
    kept, size = {}, 0
    for key in sorted(parts, key=lambda key: (key.count(".") + key.count("["), len(key))):
        size += len(json.dumps(key)) + len(json.dumps(parts[key])) + 4
        if size > _PARTS_BYTES:
            break
        kept[key] = parts[key]
    return kept


def _hash(tag: bytes, parts: Iterable[bytes]) -> bytes:
    hashed = xxh3_128(tag)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _module(name: str | None) -> str:
    """A module's name; that of the script is the same in a process that was spawned."""
    return "__main__" if name in ("__mp_main__", "__main__") else str(name)


def _is_installed(file: Any, module: str | None) -> bool:
    """Whether a file belongs to Python or to an installed package, which is known by its version."""
    if _module(module) == "__main__":
        return False
    if not isinstance(file, str):
        return str(module).partition(".")[0] in sys.stdlib_module_names
    if f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file:
        return True
    return file.startswith(_INSTALLED) or file.startswith("<frozen")


def _is_theirs(function: types.FunctionType) -> bool:
    """Whether a function is of Python's or of an installed package."""
    file, found_in = function.__code__.co_filename, function.__globals__
    if file.startswith("<") and not file.startswith("<frozen"):  # made by exec, as those of dataclasses
        return _is_installed(found_in.get("__file__"), found_in.get("__name__"))
    return _is_installed(file, found_in.get("__name__"))


def _version(module: str | None) -> str:
    found = getattr(sys.modules.get(str(module).partition(".")[0]), "__version__", None)
    return found if isinstance(found, str) else ""


def _is_set(value: Any) -> bool:
    """Whether it is what a script may have put into an installed module."""
    return _plain([value]) or (isinstance(value, types.FunctionType) and not _is_theirs(value))


def _source(file: str | None) -> bytes:
    """The digest of a file, if it is one."""
    return _hash(b"file", [Path(file).read_bytes()]) if file is not None and os.path.isfile(file) else b""


def _is_own_binary(file: str | None) -> bool:
    """Whether a module's file is compiled, and the module not known by its version."""
    return str(file).endswith(tuple(EXTENSION_SUFFIXES)) and not _is_installed(file, None)


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be found, without importing what it lies in, which `find_spec` does."""
    spec, path = None, None
    parts = name.split(".")
    for i in range(len(parts)):
        found = (finder.find_spec(".".join(parts[: i + 1]), path) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


def _named(value: Any) -> bool:
    """Whether a function or class is what its module has under its name."""
    at: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        at = getattr(at, name, None)
    return at is value


def _plain(values: Iterable[Any]) -> bool:
    """Whether values are nothing but atoms, and boxes of them."""
    left = _MOST_PLAIN
    level = list(values)
    while level:
        left -= len(level)
        kinds = set(map(type, level))
        if left < 0 or not kinds <= _ATOMS | _BOXES:
            return False
        inner = [value for value in level if type(value) in _BOXES] if kinds & _BOXES else []
        level = list(chain.from_iterable(chain(v, v.values()) if type(v) is dict else v for v in inner))
    return True


def _dump(value: Any) -> bytes:
    """Plain values as bytes that depend on nothing else: version 0 knows neither interned strings nor references."""
    return marshal.dumps(value, 0)


class _Walker:
    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.unknown: str | None = None
        self._known: dict[int, tuple[object, bytes]] = {}  # the object, so that its id stays its own
        self._sources: set[str] = set()  # modules whose files were looked at
        self._open: dict[int, int] = {}  # what is being walked through, and how far down

    def digest(self, value: Any, path: str) -> bytes:
        """The digest of a value, of which messages speak as `path`."""
        kind = type(value)
        if kind in _ATOMS:
            data = _dump(value)
            found = _hash(b"atom", [data])
            self._keep(path, found, repr(value) if len(data) <= _VALUE else None)
            return found
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._open:
            return _hash(b"again", [(len(self._open) - self._open[id(value)]).to_bytes(8, "little")])
        self._open[id(value)] = len(self._open)
        try:
            found = self._of(value, kind, path)
        except KeyboardInterrupt:
            raise
        except RecursionError:
            found = self._cannot(path, f"{kind.__qualname__} is nested too deeply")
        except BaseException as e:  # whatever it raises that is looked at
            found = self._cannot(path, f"{kind.__qualname__}: {type(e).__name__}: {e}")
        finally:
            del self._open[id(value)]
        self._known[id(value)] = value, found
        self._keep(path, found)
        return found

    def _keep(self, path: str, digest: bytes, value: str | None = None) -> None:
        if path.count(".") + path.count("[") <= _DEPTH and len(path) <= 200:
            self.parts[path] = f"#{digest.hex()[:16]}" if value is None else value

    def _cannot(self, path: str, why: str) -> bytes:
        if self.unknown is None:
            self.unknown = f"{path} is of {why}"[:300]
        return b"unknown"

    def _of(self, value: Any, kind: type, path: str) -> bytes:
        if kind in (list, tuple):
            return self._sequence(value, kind.__name__.encode(), path)
        if kind in (set, frozenset):
            return _hash(b"set", sorted(self.digest(each, f"{path}{{…}}") for each in value))
        if kind is dict:
            return self._mapping(value, path)
        for kinds, method in _KINDS:
            if isinstance(value, kinds):
                return method(self, value, path)
        for module, look in _LAZY:
            if module in sys.modules and (found := look(self, value, path)) is not None:
                return found
        return self._object(value, kind, path)

    # Containers

    def _sequence(self, values: Any, tag: bytes, path: str) -> bytes:
        hashed = xxh3_128(tag + len(values).to_bytes(8, "little"))
        few = len(values) <= _FEW
        for first in range(0, len(values), _CHUNK):
            chunk = values[first : first + _CHUNK]
            if few:
                hashed.update(b"".join(self.digest(each, f"{path}[{i}]") for i, each in enumerate(chunk)))
                continue
            if set(map(type, chunk)) <= _PATHS:
                chunk = [str(each) for each in chunk]
                hashed.update(b"paths")
            if _plain(chunk):
                hashed.update(_dump(list(chunk)))
            else:
                hashed.update(b"".join(self.digest(each, f"{path}[…]") for each in chunk))
        return hashed.digest()

    def _mapping(self, value: dict[Any, Any], path: str) -> bytes:
        if len(value) > _FEW:
            keys, values = list(value), list(value.values())
            return _hash(b"dict", [self._sequence(keys, b"k", ""), self._sequence(values, b"v", path)])
        return _hash(b"few", [self.digest(k, "") + self.digest(v, f"{path}[{k!r:.40}]") for k, v in value.items()])

    def _proxy(self, value: Any, path: str) -> bytes:
        return self._mapping(dict(value), path)

    def _state(self, state: dict[str, Any], path: str) -> bytes:
        """Attributes: their order says nothing."""
        names = sorted(state, key=str)
        return _hash(b"state", [_text(str(name)) + self.digest(state[name], f"{path}.{name}") for name in names])

    # Objects, as pickle takes them apart

    def _object(self, value: Any, kind: type, path: str) -> bytes:
        reduce = dispatch_table.get(kind)
        reduced = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            name = f"{_module(kind.__module__)}.{kind.__qualname__}.{reduced}"
            return _hash(b"global", [_text(name), *self._made_in(getattr(value, "__module__", None))])
        how, arguments, *rest = reduced
        state, items, pairs = [*rest[:3], None, None, None][:3]
        parts = [self.digest(kind, kind.__qualname__), self.digest(how, f"{path}()"), self._arguments(arguments, path)]
        if type(state) is tuple and len(state) == 2 and all(s is None or type(s) is dict for s in state):
            parts += [self._state(each, path) for each in state if each]  # of one with slots
        elif type(state) is dict:
            parts.append(self._state(state, path))
        else:
            parts.append(self.digest(state, f"{path}.state"))
        parts.append(self._sequence(list(items or ()), b"items", path))
        parts.append(self._mapping(dict(pairs or ()), path))
        return _hash(b"object", parts)

    def _arguments(self, arguments: tuple[Any, ...], path: str) -> bytes:
        return _hash(b"arguments", [self.digest(each, f"{path}({i})") for i, each in enumerate(arguments)])

    def _method(self, value: Any, path: str) -> bytes:
        return _hash(b"method", [self.digest(value.__self__, f"{path}.__self__"), self.digest(value.__func__, path)])

    def _builtin(self, value: Any, path: str) -> bytes:
        owner = getattr(value, "__self__", None)
        bound = [] if owner is None or isinstance(owner, types.ModuleType) else [self.digest(owner, f"{path}.__self__")]
        module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
        return _hash(b"builtin", [_text(f"{module}.{value.__qualname__}"), *bound, *self._made_in(module)])

    def _made_in(self, module: str | None) -> list[bytes]:
        """Of what is compiled: the module, unless it is known by its version."""
        found = sys.modules.get(str(module))
        return [self.digest(found, str(module))] if _is_own_binary(getattr(found, "__file__", None)) else []

    def _partial(self, value: Any, path: str) -> bytes:
        parts = [self.digest(value.func, f"{path}.func"), self._arguments(value.args, path)]
        return _hash(b"partial", [*parts, self._mapping(value.keywords, path), self._state(vars(value), path)])

    def _wrapper(self, value: Any, path: str) -> bytes:
        return _hash(type(value).__name__.encode(), [self.digest(value.__wrapped__, path)])

    def _property(self, value: Any, path: str) -> bytes:
        return _hash(b"property", [self.digest(f, path) for f in (value.fget, value.fset, value.fdel)])

    def _weak(self, value: Any, path: str) -> bytes:
        return _hash(b"weak", [self.digest(value(), path)])

    def _kind_only(self, value: Any, path: str) -> bytes:
        return _hash(b"kind", [_text(type(value).__qualname__)])

    def _variables(self, value: Any, path: str) -> bytes:
        return _hash(b"variables", [self.digest(type(value), path), self._state(vars(value), path)])

    def _file(self, value: Any, path: str) -> bytes:
        # As paths: what is in files is not compared.
        if isinstance(value, io.BytesIO | io.StringIO) or not value.readable() or value.writable():
            return self._object(value, type(value), path)
        return _hash(b"file", [self.digest(value.name, f"{path}.name"), self.digest(value.tell(), f"{path}.tell()")])

    def _path(self, value: PurePath, path: str) -> bytes:
        found = _hash(b"path", [_text(str(value))])
        self._keep(path, found, repr(str(value)) if len(str(value)) <= _VALUE else None)
        return found

    # Code

    def _module_itself(self, value: types.ModuleType, path: str) -> bytes:
        name, file = _module(value.__name__), getattr(value, "__file__", None)
        if _is_installed(file, value.__name__):
            return _hash(b"module", [_text(name), _text(_version(value.__name__))])
        binary = _source(file) if _is_own_binary(file) else b""
        return _hash(b"module", [_text(name), binary, self._namespace(vars(value), name)])

    def _namespace(self, names: dict[str, Any], path: str) -> bytes:
        return self._state({name: names[name] for name in names.keys() - _IMPORTED}, path)

    def _class(self, value: type, path: str) -> bytes:
        name = f"{_module(value.__module__)}.{value.__qualname__}"
        module = sys.modules.get(value.__module__)
        if _is_installed(getattr(module, "__file__", None), value.__module__) and _named(value):
            return _hash(b"class", [_text(name), _text(_version(value.__module__)), *self._replaced(value)])
        parts = [_text(name), *(self.digest(base, base.__qualname__) for base in value.__bases__)]
        if type(value) is not type:
            parts.append(self.digest(type(value), type(value).__qualname__))
        members = vars(value)
        for each in sorted(members.keys() - _IGNORED):
            parts += [_text(each), self.digest(members[each], f"{value.__qualname__}.{each}")]
        return _hash(b"class", parts)

    def _replaced(self, value: type) -> Iterator[bytes]:
        """Functions of an installed class that are not of its package: a script has put them there."""
        for name, held in vars(value).items():
            if isinstance(held, types.FunctionType) and not _is_theirs(held):
                yield _text(name) + self.digest(held, f"{value.__qualname__}.{name}")

    def _function(self, value: types.FunctionType, path: str) -> bytes:
        code = value.__code__
        theirs = _is_theirs(value)
        name = f"{_module(value.__module__)}.{value.__qualname__}"
        if theirs and _named(value):
            return _hash(b"function", [_text(name), _text(_version(value.__module__)), self._code(code)])
        own = self._code(code)
        self._keep(f"the code of {value.__qualname__}", own)
        parts = [own, self.digest(value.__defaults__, f"{value.__qualname__} defaults")]
        parts.append(self.digest(value.__kwdefaults__, f"{value.__qualname__} defaults"))
        parts.append(self._state(vars(value), value.__qualname__))
        for variable, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:
                continue  # not bound yet
            parts.append(_text(variable) + self.digest(held, f"{variable} in {value.__qualname__}"))
        if not theirs:
            parts += self._globals(code, value.__globals__)
        return _hash(b"function", parts)

    def _code(self, code: types.CodeType) -> bytes:
        """Without file names, line numbers and the text of annotations."""
        fields: list[Any] = [code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_freevars]
        fields += [code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_name]
        parts = [_dump(fields)]
        for each in code.co_consts:
            parts.append(self._code(each) if isinstance(each, types.CodeType) else self.digest(each, ""))
        return _hash(b"code", parts)

    def _globals(self, code: types.CodeType, found_in: dict[str, Any]) -> list[bytes]:
        """Digests of the globals that code refers to; of those of which it takes attributes only, of these."""
        parts = []
        module = _module(found_in.get("__name__"))
        for names in sorted(set(_references(code, str(found_in.get("__package__") or "")))):
            kind, first, *attributes = names
            if kind == "import":
                parts.append(self._import(first, attributes))
            elif first in found_in:
                parts.append(self._attribute(found_in[first], attributes, f"{module}.{first}"))
            elif first in _ALL:
                parts.append(self._namespace(found_in, module))
            elif hasattr(builtins, first):
                parts.append(self._attribute(getattr(builtins, first), attributes, first))
            parts.append(_text(" ".join(names)))
        return parts

    def _attribute(self, value: Any, attributes: list[str], path: str) -> bytes:
        """What code takes of a global: follows attributes as long as they are nothing but what lies there."""
        for name in attributes:
            held = getattr(value, "__dict__", {})
            if isinstance(value, types.ModuleType):
                if _is_installed(getattr(value, "__file__", None), value.__name__) and not _is_set(held.get(name)):
                    return _hash(b"of", [self.digest(value, path), _text(name)])
            elif getattr(type(value), "__getattribute__", None) not in _USUAL:
                break
            if name not in held or hasattr(type(value), name):
                break
            if isinstance(value, type) and hasattr(held[name], "__get__"):
                break  # of a class: a method, or what computes it
            value, path = held[name], f"{path}.{name}"
        return self.digest(value, path)

    def _import(self, name: str, attributes: list[str]) -> bytes:
        """A module that a function imports when it is called."""
        module = sys.modules.get(name)
        parts = [self._file_of(name) if module is None else self._attribute(module, attributes, name)]
        if attributes and attributes[0] not in getattr(module, "__dict__", {}) and _spec(f"{name}.{attributes[0]}"):
            parts.append(self._import(f"{name}.{attributes[0]}", attributes[1:]))
        return _hash(b"import", parts)

    def _file_of(self, name: str) -> bytes:
        """A module that was not imported yet: its source, and what that imports."""
        spec = _spec(name)
        if spec is None or _is_installed(spec.origin, name):
            return _hash(b"named", [_text(name), _text(_version(name))])
        if name in self._sources:
            return b""
        self._sources.add(name)
        parts = [_text(name), _source(spec.origin)]
        if spec.origin is not None and spec.origin.endswith(tuple(SOURCE_SUFFIXES)):
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            code = compile(Path(spec.origin).read_bytes(), spec.origin, "exec", dont_inherit=True)
            parts += [
                self._import(first, rest) for kind, first, *rest in _references(code, package) if kind == "import"
            ]
        return _hash(b"source", parts)

    # Arrays and tensors

    def _numpy(self, value: Any, path: str) -> bytes | None:
        numpy = sys.modules["numpy"]
        if not isinstance(value, numpy.ndarray):
            return None
        about = [_text(repr((value.dtype.descr, value.shape, value.strides)))]
        if type(value) not in (numpy.ndarray, numpy.memmap):
            state = object.__getstate__(value)
            about += [self.digest(type(value), path), self.digest(state, path)]
        if value.dtype.names is not None:  # one by one, since nobody knows what lies between them
            fields = (value[name].view(numpy.ndarray) for name in value.dtype.names)
            return _hash(b"fields", [*about, *(self.digest(field, path) for field in fields)])
        if value.dtype.hasobject:
            return _hash(b"objects", [*about, self._sequence(value.ravel().tolist(), b"o", path)])
        mapped = _mapping_of(value)
        if mapped is not None:  # as paths: what is in files is not compared
            begins = numpy.frombuffer(mapped._mmap, numpy.uint8).__array_interface__["data"][0]
            at = value.__array_interface__["data"][0] - begins
            return _hash(b"mapped", [*about, _text(repr((str(mapped.filename), mapped.offset, at)))])
        whole = numpy.ascontiguousarray(value.view(numpy.ndarray)).reshape(-1)
        return _hash(b"array", [*about, whole.view(numpy.uint8).data if whole.size else b""])

    def _torch(self, value: Any, path: str) -> bytes | None:
        torch = sys.modules["torch"]
        if isinstance(value, torch.Generator):
            return _hash(b"generator", [self.digest(value.get_state(), path)])
        if isinstance(value, torch.TypedStorage):
            return _hash(b"typed", [_text(str(value.dtype)), self.digest(value._untyped_storage, path)])
        if isinstance(value, torch.UntypedStorage):
            value = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value)
        elif type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_nested:
            return None
        plain = value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().cpu().contiguous()
        about = (type(value).__qualname__, str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad)
        data = plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""
        return _hash(b"tensor", [_text(repr(about)), data, self._state(vars(value), path)])

    def _ctypes(self, value: Any, path: str) -> bytes:
        memory = memoryview(value)
        if not set(memory.format) <= _NUMBERS:
            return self._cannot(path, f"{type(value).__qualname__}: it may have pointers")
        return _hash(b"ctypes", [_text(type(value).__qualname__), memory.tobytes()])

    # Of multiprocessing

    def _lock(self, value: Any, path: str) -> bytes | None:
        module = sys.modules["multiprocessing.synchronize"]
        kinds = module.SemLock, module.Condition, module.Event
        return self._kind_only(value, path) if isinstance(value, kinds) else None

    def _shared(self, value: Any, path: str) -> bytes | None:
        if not isinstance(value, sys.modules["multiprocessing.sharedctypes"].SynchronizedBase):
            return None
        return _hash(b"shared", [self.digest(value.get_obj(), path)])


def _mapping_of(array: Any) -> Any:
    """The memmap that an array is a view of, if it is."""
    numpy = sys.modules["numpy"]
    while isinstance(array, numpy.ndarray):
        if isinstance(array, numpy.memmap) and array._mmap is not None:
            return array
        array = array.base
    return None


def _references(code: types.CodeType, package: str) -> Iterator[tuple[str, ...]]:
    """Globals that code names, and modules that it imports, each with the attributes that are taken of it at once."""
    taken: tuple[str, ...] = ()  # the one that is being followed
    level = 0
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("LOAD_ATTR", "LOAD_METHOD") and taken[:1] == ("global",):
            taken += (str(value),)
            continue
        if name == "IMPORT_FROM" and taken[:1] == ("import",):
            yield (*taken[:2], str(value))
            taken = (*taken[:2], "")  # which has been told of
            continue
        if taken[:1] == ("import",) and name.startswith("STORE_"):
            continue
        if taken and taken[-1]:
            yield taken
        taken = ()
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            taken = "global", str(value)
        elif name == "LOAD_CONST" and isinstance(value, int):
            level = value
        elif name == "IMPORT_NAME":
            relative = "." * level + str(value)
            taken = "import", importlib.util.resolve_name(relative, package) if level and package else relative
    if taken and taken[-1]:
        yield taken
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _references(each, package)


# How attributes are looked up.
_USUAL: tuple[object, ...] = (
    object.__getattribute__,
    type.__getattribute__,
    types.SimpleNamespace.__getattribute__,
)
_PATHS = frozenset((PosixPath, PurePosixPath))

_KINDS: list[tuple[Any, Callable[[_Walker, Any, str], bytes]]] = [
    (types.FunctionType, _Walker._function),
    (type, _Walker._class),
    (types.ModuleType, _Walker._module_itself),
    (types.MethodType, _Walker._method),
    (
        (
            types.BuiltinFunctionType,
            types.WrapperDescriptorType,
            types.MethodDescriptorType,
            types.MethodWrapperType,
            types.ClassMethodDescriptorType,
            types.GetSetDescriptorType,
            types.MemberDescriptorType,
        ),
        _Walker._builtin,
    ),
    (functools.partial, _Walker._partial),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), _Walker._wrapper),
    (property, _Walker._property),
    (weakref.ref, _Walker._weak),
    (types.MappingProxyType, _Walker._proxy),
    (_LOCKS, _Walker._kind_only),
    (threading.local, _Walker._variables),
    ((ctypes.Array, ctypes._SimpleCData), _Walker._ctypes),
    (io.IOBase, _Walker._file),
    (PurePath, _Walker._path),
]
_LAZY: list[tuple[str, Callable[[_Walker, Any, str], bytes | None]]] = [
    ("torch", _Walker._torch),
    ("numpy", _Walker._numpy),
    ("multiprocessing.synchronize", _Walker._lock),
    ("multiprocessing.sharedctypes", _Walker._shared),
]
