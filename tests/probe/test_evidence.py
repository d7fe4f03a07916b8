"""What is read of a host: files of a made-up one, and of hosts that keep things to themselves."""

from __future__ import annotations

from pathlib import Path

from pykvm.probe.evidence import Evidence, read_evidence, vmalloc_areas


def host(root: Path) -> Path:
    for name, value in {
        "sys/module/kvm/parameters/tdp_mmu": "Y\n",
        "sys/module/kvm/parameters/nx_huge_pages": "never\n",
        "sys/module/kvm/parameters/halt_poll_ns": "200000\n",
        "sys/module/kvm_intel/parameters/ept": "1\n",
        "proc/cpuinfo": "flags\t: fpu vmx\nvmx flags\t: ept ept_1gb\n\nprocessor : 1\nflags : other\n",
        "proc/kallsyms": "0 T __kvm_write_track_add_gfn\n0 T kvm_write_track_add_gfn\t[kvm]\n0 T other\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return root


def test_a_host_that_tells(tmp_path: Path) -> None:
    evidence = read_evidence(host(tmp_path))
    assert evidence.switch("kvm_amd.npt", "kvm_intel.ept") == ("kvm_intel.ept", True)
    assert evidence.switch("kvm.nx_huge_pages") == ("kvm.nx_huge_pages", False)
    assert evidence.switch("kvm.halt_poll_ns") is None, "a number is no switch"
    assert evidence.parameter("kvm.halt_poll_ns") == ("kvm.halt_poll_ns", "200000")
    assert evidence.flags == {"fpu", "vmx", "vmx:ept", "vmx:ept_1gb"}
    assert evidence.vendor == "intel"
    assert evidence.external_write_tracking is True


def test_a_host_without_sysfs_or_symbols(tmp_path: Path) -> None:
    """Missing files are no error: they say nothing."""
    evidence = read_evidence(tmp_path)
    assert evidence == Evidence()
    assert evidence.vendor == ""
    assert evidence.external_write_tracking is None
    assert evidence.switch("kvm.tdp_mmu") is None


def test_symbols_that_say_how_kvm_was_built(tmp_path: Path) -> None:
    """Linux before 6.6 has other names, and functions for external users in every build."""
    host(tmp_path)
    (tmp_path / "proc/kallsyms").write_text("0 T __kvm_write_track_add_gfn\n")
    assert read_evidence(tmp_path).external_write_tracking is False
    (tmp_path / "proc/kallsyms").write_text("0 T kvm_slot_page_track_add_page\n0 T other_write_track\n")
    assert read_evidence(tmp_path).external_write_tracking is None
    (tmp_path / "proc/kallsyms").write_text("")
    assert read_evidence(tmp_path).symbols is None


def test_vendors_by_module_then_by_processor() -> None:
    assert Evidence(parameters={"kvm": {}, "kvm_amd": {}}).vendor == "amd"
    assert Evidence(parameters={"kvm_pvm": {}}, flags=frozenset({"svm"})).vendor == "pvm"
    assert Evidence(flags=frozenset({"svm"})).vendor == "amd"


def test_allocations_of_the_kernel(tmp_path: Path) -> None:
    info = tmp_path / "vmallocinfo"
    info.write_text(
        "0x1-0x2   12288 kvm_page_track_create_memslot+0x4/0x10 [kvm] pages=2 vmalloc\n"
        "0x3-0x4   12288 kvm_page_track_create_memslot+0x4/0x10 [kvm] pages=2 vmalloc\n"
        "0x5-0x6    8192 memslot_rmap_alloc+0x4/0x10 [kvm] pages=1 vmalloc\n"
        "0x7-0x8    8192\n"
    )
    assert vmalloc_areas("kvm_page_track", info) == {12288: 2}
    assert vmalloc_areas("nobody", info) == {}
    assert vmalloc_areas("kvm_page_track", tmp_path / "none") is None
