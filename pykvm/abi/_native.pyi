from pykvm.abi.library import Ffi, Library

ffi: Ffi
lib: Library
