//! Memory that goes back to the host: the part of virtio-balloon (virtio 1.2 §5.5) by which a guest reports
//! pages that are free (VIRTIO_BALLOON_F_REPORTING, §5.5.6.7).
//!
//! The host asks for nothing: the balloon's size is 0 and stays so. The guest's kernel reports what has been
//! free for some two seconds, in blocks, and waits for the answer before anybody may take them; they are
//! given back on the vCPU that reports them. So there is never anything under way.

use hermitage_storage::snapshot::Run;
use serde::{Deserialize, Serialize};

use super::{Context, Fault, StateError, Transport, VirtioDevice, queue::VirtQueue};
use crate::memory::release::Releaser;

/// §5.5.3.
mod feature {
    pub const REPORTING: u64 = 1 << 5;
}

/// Linux reports up to 32 blocks in a chain, one chain at a time.
const QUEUE_SIZE: u16 = 64;

/// Without the queues for statistics and hints, which are not offered, reporting comes third.
const REPORTING_QUEUE: usize = 2;

#[derive(Default)]
pub struct Balloon {
    /// Of a machine that was resumed.
    resumed: bool,
    releaser: Option<Releaser>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {}

impl Balloon {
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers what the driver has made available.
    fn serve(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        let Some(queue) = context.queues.get_mut(index) else { return Ok(()) };
        // As many as can be there at once; who has more by then feeds it from another CPU to keep this one
        // here.
        for _ in 0..=QUEUE_SIZE {
            let Some(chain) = queue.pop(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(());
            };
            if index == REPORTING_QUEUE {
                let resumed = self.resumed;
                let releaser = self.releaser.get_or_insert_with(|| Releaser::new(memory, resumed));
                for block in &chain.writable {
                    // The guest may take the pages again in either case; they only cost more.
                    if let Err(error) = releaser.release(block.address.0, block.length.into()) {
                        tracing::debug!(%error, "can't give memory back");
                    }
                }
            }
            queue.complete(memory, chain.head, 0)?;
        }
        Err(queue.broken("more and more requests while they are answered"))
    }
}

impl VirtioDevice for Balloon {
    const NAME: &'static str = "balloon";
    const ID: u32 = 5;
    /// Inflate, deflate, reporting (§5.5.2).
    const QUEUES: &'static [u16] = &[QUEUE_SIZE; 3];
    const FEATURES: u64 = feature::REPORTING | super::transport::feature::INDIRECT_DESC;
    type State = BalloonState;

    /// `num_pages`, `actual`, and two fields of features that are not offered (§5.5.4).
    fn config(&self) -> Vec<u8> {
        vec![0; 16]
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        (0..Self::QUEUES.len()).try_for_each(|queue| self.serve(queue, context))
    }

    fn notify(&mut self, queue: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        self.serve(queue, context)
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<BalloonState, StateError> {
        Ok(BalloonState {})
    }

    fn load(&mut self, _state: BalloonState) -> Result<(), StateError> {
        Ok(())
    }

    fn resume(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        for index in 0..Self::QUEUES.len() {
            if context.queues.get_mut(index).is_some_and(VirtQueue::take_pending) {
                self.serve(index, context)?;
            }
        }
        Ok(())
    }
}

/// For the control thread.
impl Transport<Balloon> {
    /// The machine is made of a snapshot: to be said before it runs.
    pub fn set_resumed(&self) {
        // Nothing was asked of the device yet, so it can't fail.
        let _ = self.with(|balloon, _| {
            balloon.resumed = true;
            Ok(())
        });
    }

    /// The pages that are still those of the snapshot that the machine was resumed with.
    pub fn left_of(&self, runs: &[Run]) -> Vec<Run> {
        self.look(|balloon| match &balloon.releaser {
            Some(releaser) => releaser.left_of(runs),
            None => runs.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::{
        super::testing::{Driver, MEMORY},
        *,
    };
    use crate::memory::GuestMemory;

    const PAGE: u64 = 4096;

    fn driver() -> Driver<Balloon> {
        // The last region is the root image's.
        let ranges = [(GuestAddress(0), MEMORY as usize), (GuestAddress(1 << 32), PAGE as usize)];
        Driver::start_in(Balloon::new(), GuestMemory::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn reported_pages_are_given_back_and_others_are_not() {
        let mut driver = driver();
        let at = 20 << 20;
        for page in 0..4 {
            driver.memory.write_obj(7u8, GuestAddress(at + page * PAGE)).unwrap();
        }
        let chain = [(at, PAGE as u32, true), (at + 2 * PAGE, PAGE as u32, true)];
        driver.submit(REPORTING_QUEUE, &chain).unwrap();
        assert_eq!(driver.used(REPORTING_QUEUE).len(), 1);
        let bytes: Vec<u8> = (0..4)
            .map(|page| driver.memory.read_obj(GuestAddress(at + page * PAGE)).unwrap())
            .collect();
        assert_eq!(bytes, [0, 7, 0, 7]);
        // What is only readable, or on another queue, is no report.
        driver.submit(REPORTING_QUEUE, &[(at + PAGE, PAGE as u32, false)]).unwrap();
        driver.submit(0, &[(at + 3 * PAGE, PAGE as u32, true)]).unwrap();
        assert_eq!((driver.used(REPORTING_QUEUE).len(), driver.used(0).len()), (1, 1));
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(at + PAGE)).unwrap(), 7);
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(at + 3 * PAGE)).unwrap(), 7);
    }

    #[test]
    fn the_host_asks_for_nothing() {
        let driver = driver();
        assert!((0..4).all(|word| driver.get(0x100 + 4 * word) == 0));
    }

    #[test]
    fn a_restored_device_goes_on() {
        let mut driver = driver();
        driver.submit(REPORTING_QUEUE, &[(20 << 20, PAGE as u32, true)]).unwrap();
        driver.used(REPORTING_QUEUE);
        let mut fork = driver.fork(Balloon::new());
        fork.device.set_resumed();
        fork.device.resume().unwrap();
        fork.submit(REPORTING_QUEUE, &[(21 << 20, PAGE as u32, true)]).unwrap();
        assert_eq!(fork.used(REPORTING_QUEUE).len(), 1);
    }
}
