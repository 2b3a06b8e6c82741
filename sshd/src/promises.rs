//! What running machines are promised together, and whether the host can take one more.
//!
//! A machine is promised the memory that its account is to have, and room on the disk for all of it when it is saved. Most use a
//! hundredth of that, so hosts promise many times what they have: how many times is the operator's to say. One
//! more machine than that is refused with words, which is better than a host that kills processes for want of
//! memory, or a save that does not fit. What there really is left is looked at as well.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hermitage_storage::{
    StateDir,
    base::{self, Base, BaseId},
};

use crate::config::Machines;

const MIB: u64 = 1 << 20;

#[derive(Clone, Default)]
pub struct Promises(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    bytes: u64,
    /// What machines of bases, which never change, can have, by their ids.
    sizes_of: HashMap<String, base::Machine>,
}

/// A machine's part of it, given back when dropped.
pub struct Promise {
    promises: Promises,
    bytes: u64,
}

/// Why there is no more, with what an operator can do about it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error(
        "{available} MiB of memory are available, less than machines.min_available_mib = {floor}; fewer \
         machines, or more memory, help"
    )]
    Available { available: u64, floor: u64 },
    #[error(
        "running machines would be promised {promised} MiB of memory, more than machines.memory_overcommit = \
         {times} times the host's {total} MiB"
    )]
    Memory { promised: u64, times: u64, total: u64 },
    #[error(
        "saving all running machines may take {promised} MiB, more than machines.save_overcommit = {times} \
         times the {free} MiB that are free where the state directory is"
    )]
    Saves { promised: u64, times: u64, free: u64 },
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
struct Host {
    memory: u64,
    available: u64,
    free: u64,
}

impl Promises {
    /// Promises a machine what it needs: the memory that its account is to have, as far as its base has it, or what
    /// it `had` when it was saved, and on which base. `free` is the room for saves. Reads small files.
    pub fn make(
        &self,
        state: &StateDir,
        limits: &Machines,
        wanted: Option<u64>,
        had: Option<(BaseId, u64)>,
        free: u64,
    ) -> Result<Promise, Full> {
        // If it can't be told, the start that follows says why, better than this could.
        let (base, had) = had.map_or((None, 0), |(base, bytes)| (Some(base), bytes));
        let base = base.or_else(|| state.current_base().ok()?);
        let sizes = base.and_then(|base| self.sizes(state, &base));
        let fit = sizes.map_or(0, |sizes| sizes.fit(wanted, None).memory_bytes);
        let bytes = fit.max(had);
        // Without /proc nothing can be judged, and little else works.
        let (memory, available) = memory().unwrap_or((u64::MAX, u64::MAX));
        self.promise(bytes, limits, Host { memory, available, free })
    }

    fn promise(&self, bytes: u64, limits: &Machines, host: Host) -> Result<Promise, Full> {
        let mut table = self.table();
        let promised = table.bytes.saturating_add(bytes);
        judge(promised, limits, host)?;
        table.bytes = promised;
        Ok(Promise { promises: self.clone(), bytes })
    }

    fn sizes(&self, state: &StateDir, id: &BaseId) -> Option<base::Machine> {
        if let Some(sizes) = self.table().sizes_of.get(id.as_str()) {
            return Some(*sizes);
        }
        let sizes = Base::manifest(&state.base(id)).ok()?.content.machine;
        let mut table = self.table();
        // Bases come with the years; old ones may be looked up again.
        if table.sizes_of.len() >= 64 {
            table.sizes_of.clear();
        }
        table.sizes_of.insert(id.as_str().to_owned(), sizes);
        Some(sizes)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut table = self.promises.table();
        table.bytes = table.bytes.saturating_sub(self.bytes);
    }
}

fn judge(promised: u64, limits: &Machines, host: Host) -> Result<(), Full> {
    let floor = limits.min_available_mib;
    if host.available / MIB < floor {
        return Err(Full::Available { available: host.available / MIB, floor });
    }
    let over = |times: u64, of: u64| times > 0 && promised > of.saturating_mul(times);
    let times = limits.memory_overcommit;
    if over(times, host.memory) {
        return Err(Full::Memory { promised: promised / MIB, times, total: host.memory / MIB });
    }
    let times = limits.save_overcommit;
    if over(times, host.free) {
        return Err(Full::Saves { promised: promised / MIB, times, free: host.free / MIB });
    }
    Ok(())
}

/// All of the host's memory, and what can be had without swapping (proc_meminfo(5)).
fn memory() -> io::Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib: Option<u64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        kib.map(|kib| kib.saturating_mul(1024)).ok_or(io::ErrorKind::InvalidData.into())
    };
    field("MemTotal").and_then(|total| Ok((total, field("MemAvailable")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const HOST: Host = Host { memory: 2 * GIB, available: GIB, free: GIB };

    #[test]
    fn so_many_times_what_there_is_is_promised_and_no_more() {
        let limits = Machines { memory_overcommit: 2, save_overcommit: 0, ..Machines::default() };
        let promises = Promises::default();
        let held: Vec<_> =
            (0..8).map(|_| promises.promise(GIB / 2, &limits, HOST).unwrap()).collect();
        let full = promises.promise(GIB / 2, &limits, HOST).err().unwrap();
        assert_eq!(full, Full::Memory { promised: 4608, times: 2, total: 2048 });
        assert!(full.to_string().contains("machines.memory_overcommit"), "{full}");
        drop(held.into_iter().next());
        assert!(promises.promise(GIB / 2, &limits, HOST).is_ok(), "given back");
        assert_eq!(promises.table().bytes, 0);
    }

    #[test]
    fn saves_have_to_fit_and_memory_has_to_be_there() {
        let limits = Machines { memory_overcommit: 0, save_overcommit: 1, ..Machines::default() };
        let promises = Promises::default();
        let _one = promises.promise(GIB, &limits, HOST).unwrap();
        let full = promises.promise(1, &limits, HOST).err().unwrap();
        assert!(matches!(full, Full::Saves { times: 1, free: 1024, .. }), "{full}");
        let none = Machines { save_overcommit: 0, ..limits };
        let _more = promises.promise(u64::MAX / 2, &none, HOST).unwrap();
        let poor = Host { available: 5 * MIB, ..HOST };
        let full = promises.promise(0, &none, poor).err().unwrap();
        assert!(matches!(full, Full::Available { available: 5, .. }), "{full}");
    }

    #[test]
    fn this_host_has_memory() {
        let (total, available) = memory().unwrap();
        assert!(total >= available && available > 0);
    }
}
