//! What each processor says of itself: the host's answer to `KVM_GET_SUPPORTED_CPUID`, with the
//! leaves that depend on the machine and the processor filled in.
//!
//! All processors are cores of one package, one thread each, with APIC ids from 0. They share the
//! last cache level and have the others for themselves. Leaf numbers and fields are those of the
//! Intel SDM (volume 2, CPUID) and the AMD APM (volume 3, appendix E).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the leaves depend on besides the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Topology {
    /// How many processors the machine has, 1 to 32.
    pub cpus: u8,
    /// Whether KVM's local APIC has a TSC deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`: KVM leaves
    /// it out of the leaves because it depends on the APIC being in the kernel).
    pub tsc_deadline: bool,
}

/// Fills in the leaves of processor `id`. Cheap enough to be done over for each from the same start.
pub(super) fn fill_in(cpuid: &mut CpuId, topology: Topology, id: u8) {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => features(entry, topology, id),
            0x4 | 0x8000_001d => caches(entry, topology),
            // No performance counters: kiln's guests have no use for what they can measure.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => extended_topology(entry, topology, id),
            0x8000_0008 => {
                entry.ecx &= !0xf0ff;
                entry.ecx |= apic_id_bits(topology.cpus) << 12 | u32::from(topology.cpus - 1);
            }
            0x8000_001e => {
                entry.eax = id.into();
                entry.ebx = id.into();
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    add_missing_topology(cpuid, topology, id);
}

fn features(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u8) {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HYPER_THREADING: u32 = 1 << 28;

    entry.ebx &= 0xffff;
    entry.ebx |= u32::from(id) << 24 | (1 << apic_id_bits(topology.cpus)) << 16;
    entry.ecx |= HYPERVISOR;
    if topology.tsc_deadline {
        entry.ecx |= TSC_DEADLINE;
    }
    // The bit says that the count of logical processors in ebx is valid.
    if topology.cpus > 1 {
        entry.edx |= HYPER_THREADING;
    } else {
        entry.edx &= !HYPER_THREADING;
    }
}

fn caches(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    const LAST_LEVEL: u32 = 3;

    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let cores = (1u32 << apic_id_bits(topology.cpus)) - 1;
    let sharing = if level >= LAST_LEVEL { u32::from(topology.cpus - 1) } else { 0 };
    entry.eax &= 0x3fff;
    entry.eax |= sharing << 14;
    // Leaf 4 alone has the number of cores in its upper bits; in AMD's they are reserved.
    if entry.function == 0x4 {
        entry.eax |= cores << 26;
    }
}

fn extended_topology(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u8) {
    let (shift, count, kind) = match entry.index {
        0 => (0, 1, LEVEL_SMT),
        1 => (apic_id_bits(topology.cpus), u32::from(topology.cpus), LEVEL_CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = kind << 8 | entry.index;
    entry.edx = id.into();
}

/// KVM reports the first sub-leaf only, or no such leaf at all, where the host has no such
/// topology.
fn add_missing_topology(cpuid: &mut CpuId, topology: Topology, id: u8) {
    const SIGNIFICANT_INDEX: u32 = 1;

    for index in 0..=2 {
        if cpuid.as_slice().iter().any(|e| e.function == 0xb && e.index == index) {
            continue;
        }
        let mut entry = kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            ..Default::default()
        };
        extended_topology(&mut entry, topology, id);
        // A host with no room for it in KVM's table of 256 has none for the guest either.
        let _ = cpuid.push(entry);
    }
    for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 0xb) {
        entry.flags |= SIGNIFICANT_INDEX;
    }
    if let Some(highest) = cpuid.as_mut_slice().iter_mut().find(|e| e.function == 0) {
        highest.eax = highest.eax.max(0xb);
    }
}

/// How many bits of an APIC id tell the package's processors apart.
fn apic_id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            edx: 0xffff_ffff,
            ..Default::default()
        };
        let mut cache = leaf(4, 3);
        cache.eax = 0xffff_c163;
        let leaves = [leaf(0, 0), leaf(1, 0), cache, leaf(0xb, 0), leaf(0x8000_0008, 0)];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_processor_has_its_apic_id_in_every_leaf_that_names_it() {
        for id in 0..5 {
            let mut cpuid = host();
            fill_in(&mut cpuid, Topology { cpus: 5, tsc_deadline: true }, id);
            let leaf_1 = find(&cpuid, 1, 0);
            assert_eq!(leaf_1.ebx >> 24, u32::from(id));
            assert_eq!(leaf_1.ebx >> 16 & 0xff, 8);
            assert_eq!(leaf_1.ebx & 0xffff, 0xffff);
            assert_eq!(leaf_1.ecx, 1 << 31 | 1 << 24);
            for index in 0..3 {
                assert_eq!(find(&cpuid, 0xb, index).edx, u32::from(id));
            }
        }
    }

    #[test]
    fn the_package_has_one_thread_a_core() {
        let mut cpuid = host();
        fill_in(&mut cpuid, Topology { cpus: 6, tsc_deadline: false }, 0);
        let (smt, core, end) = (find(&cpuid, 0xb, 0), find(&cpuid, 0xb, 1), find(&cpuid, 0xb, 2));
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn the_last_cache_level_is_shared() {
        let mut cpuid = host();
        fill_in(&mut cpuid, Topology { cpus: 4, tsc_deadline: false }, 0);
        let cache = find(&cpuid, 4, 3);
        assert_eq!(cache.eax, 0x163 | 3 << 14 | 3 << 26);
    }

    #[test]
    fn a_single_processor_does_not_claim_threads() {
        let mut cpuid = host();
        fill_in(&mut cpuid, Topology { cpus: 1, tsc_deadline: false }, 0);
        let leaf = find(&cpuid, 1, 0);
        assert_eq!(leaf.edx & 1 << 28, 0);
        assert_eq!(leaf.ebx >> 16 & 0xff, 1);
    }
}
