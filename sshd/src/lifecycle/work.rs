//! What a guest says of its processes, as a judgement: is something being worked on, and by whom.

use hermitage_guest_proto::{Activity, WaitsFor};

use super::state::Work;

/// The work there is, if it is more than `busy_percent` of one processor, waits to go on, or has
/// connections.
pub(super) fn work(activity: &Activity, busy_percent: u64) -> Option<Work> {
    let permille = u64::from(activity.cpu_permille);
    if permille >= busy_percent.saturating_mul(10) {
        let busiest = activity.busy.iter().find(|busy| busy.cpu_permille > 0);
        let who = busiest.map(|busy| named(&busy.name, busy.pid));
        return Some(Work {
            who: who.unwrap_or_else(|| "processes that come and go".into()),
            how: format!("{} % CPU", permille / 10),
        });
    }
    let waiting = activity.busy.iter().find(|busy| busy.waits_for != WaitsFor::Nothing);
    if let Some(waiting) = waiting {
        let how = match waiting.waits_for {
            WaitsFor::Disk => "waits for the disk",
            WaitsFor::Processor | WaitsFor::Nothing => "waits for the processor",
        };
        return Some(Work { who: named(&waiting.name, waiting.pid), how: how.into() });
    }
    if activity.connections > 0 {
        let who = match &activity.peer {
            Some(peer) => format!("a connection to {peer}"),
            None => "a connection".into(),
        };
        let how = match activity.connections {
            1 => "established".into(),
            count => format!("{count} established"),
        };
        return Some(Work { who, how });
    }
    None
}

fn named(name: &str, pid: u32) -> String {
    match name.trim() {
        "" => format!("process {pid}"),
        name => format!("{name} (pid {pid})"),
    }
}

#[cfg(test)]
mod tests {
    use hermitage_guest_proto::Busy;

    use super::*;

    fn busy(name: &str, cpu_permille: u32, waits_for: WaitsFor) -> Busy {
        Busy { pid: 812, name: name.into(), cpu_permille, waits_for }
    }

    fn words(activity: Activity) -> Option<String> {
        work(&activity, 10).map(|work| work.to_string())
    }

    #[test]
    fn idle_shells_editors_and_timers_are_no_work() {
        assert_eq!(words(Activity::default()), None);
        let ticking = busy("top", 30, WaitsFor::Nothing);
        let little = Activity { cpu_permille: 99, busy: vec![ticking], ..Activity::default() };
        assert_eq!(words(little), None);
    }

    #[test]
    fn what_keeps_a_machine_awake_is_named() {
        let make = busy("make", 900, WaitsFor::Nothing);
        let activity = Activity { cpu_permille: 974, busy: vec![make], ..Activity::default() };
        assert_eq!(words(activity).unwrap(), "make (pid 812), 97 % CPU");
        let nobody = Activity { cpu_permille: 100, ..Activity::default() };
        assert_eq!(words(nobody).unwrap(), "processes that come and go, 10 % CPU");
        let waits =
            |waits_for| Activity { busy: vec![busy("dd", 0, waits_for)], ..Activity::default() };
        assert_eq!(words(waits(WaitsFor::Disk)).unwrap(), "dd (pid 812), waits for the disk");
        assert!(words(waits(WaitsFor::Processor)).unwrap().ends_with("waits for the processor"));
        let peer = Some("1.2.3.4:22".to_owned());
        let connected = Activity { connections: 2, peer, ..Activity::default() };
        assert_eq!(words(connected).unwrap(), "a connection to 1.2.3.4:22, 2 established");
    }
}
