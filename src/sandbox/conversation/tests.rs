use super::*;
use proptest::prelude::*;

fn hello(protocol: u32) -> FromAgent {
    FromAgent::Hello { protocol, version: "0.1.0".to_owned(), kernel: "6.12".to_owned() }
}

fn exited(container: &str) -> FromAgent {
    FromAgent::Exited {
        container: container.to_owned(),
        status: ExitStatus::Code(0),
        oom_killed: false,
    }
}

fn at(stage: Stage) -> Conversation {
    Conversation { stage, ..Conversation::new("c") }
}

fn running() -> Conversation {
    at(Stage::Running)
}

fn exec_started(exec: u32) -> FromAgent {
    FromAgent::ExecStarted { container: "c".to_owned(), exec: ExecId(exec) }
}

fn exec_exited(exec: u32) -> FromAgent {
    let status = ExitStatus::Code(0);
    FromAgent::ExecExited { container: "c".to_owned(), exec: ExecId(exec), status }
}

fn exec_failed(exec: u32, exit_code: u8) -> FromAgent {
    FromAgent::ExecFailed {
        container: "c".to_owned(),
        exec: ExecId(exec),
        phase: FailurePhase::Exec,
        message: String::new(),
        exit_code,
    }
}

#[test]
fn whole_life() {
    let mut conversation = Conversation::new("c");
    assert!(conversation.hear(hello(VERSION)).is_ok());
    conversation.creating();
    let created = FromAgent::Created { container: "c".to_owned() };
    assert_eq!(conversation.hear(created), Ok(Progress::Created));
    conversation.starting();
    let started = FromAgent::Started { container: "c".to_owned() };
    assert_eq!(conversation.hear(started), Ok(Progress::Started));
    assert!(matches!(conversation.hear(exited("c")), Ok(Progress::Exited { .. })));
    assert!(matches!(conversation.hear(exited("c")), Err(Breach::OutOfTurn { .. })));
}

#[test]
fn another_version_is_named() {
    let error = Conversation::new("c").hear(hello(VERSION + 1)).expect_err("refused");
    assert_eq!(error, Breach::Version { theirs: VERSION + 1, version: "0.1.0".to_owned() });
}

#[test]
fn exit_before_start_other_containers_and_impossible_values_are_breaches() {
    let mut early = Conversation::new("c");
    early.hear(hello(VERSION)).expect("greeted");
    early.creating();
    assert!(matches!(early.hear(exited("c")), Err(Breach::OutOfTurn { .. })));
    assert_eq!(running().hear(exited("d")), Err(Breach::OtherContainer));
    let signal = FromAgent::Exited {
        container: "c".to_owned(),
        status: ExitStatus::Signal(65),
        oom_killed: false,
    };
    assert_eq!(running().hear(signal), Err(Breach::Impossible("signal number")));
}

#[test]
fn a_failure_can_not_look_like_success() {
    let mut conversation = at(Stage::Starting);
    let failed = FromAgent::Failed {
        container: "c".to_owned(),
        phase: FailurePhase::Exec,
        message: String::new(),
        exit_code: 0,
    };
    assert!(matches!(conversation.hear(failed), Err(Breach::Impossible(_))));
}

#[test]
fn a_start_that_crosses_the_end_is_refused_once() {
    let failed = || FromAgent::Failed {
        container: "c".to_owned(),
        phase: FailurePhase::Exec,
        message: "container \"c\" does not exist".to_owned(),
        exit_code: 1,
    };
    let mut conversation = at(Stage::Created);
    conversation.starting();
    assert!(matches!(conversation.hear(exited("c")), Ok(Progress::Exited { .. })));
    assert_eq!(conversation.hear(failed()), Ok(Progress::StartedTooLate));
    assert!(matches!(conversation.hear(failed()), Err(Breach::OutOfTurn { .. })));
    let mut conversation = running();
    conversation.hear(exited("c")).expect("ended");
    assert!(matches!(conversation.hear(failed()), Err(Breach::OutOfTurn { .. })));
}

#[test]
fn execs_start_and_end_once_each() {
    let mut conversation = running();
    for exec in [1, 2] {
        conversation.executing(ExecId(exec));
    }
    assert_eq!(conversation.hear(exec_started(2)), Ok(Progress::ExecStarted(ExecId(2))));
    assert!(matches!(conversation.hear(exec_exited(2)), Ok(Progress::ExecExited { .. })));
    assert_eq!(conversation.hear(exec_exited(2)), Err(Breach::Unknown("a process")));
    assert!(matches!(conversation.hear(exec_failed(1, 127)), Ok(Progress::ExecFailed { .. })));
    assert_eq!(conversation.hear(exec_started(1)), Err(Breach::Unknown("a process")));
}

#[test]
fn execs_out_of_turn_are_breaches() {
    let with_exec = || {
        let mut conversation = running();
        conversation.executing(ExecId(1));
        conversation
    };
    assert_eq!(running().hear(exec_started(1)), Err(Breach::Unknown("a process")));
    assert!(matches!(with_exec().hear(exec_exited(1)), Err(Breach::OutOfTurn { .. })));
    assert!(matches!(with_exec().hear(exec_failed(1, 0)), Err(Breach::Impossible(_))));
    let other = FromAgent::ExecStarted { container: "d".to_owned(), exec: ExecId(1) };
    assert_eq!(with_exec().hear(other), Err(Breach::OtherContainer));
    let mut started = with_exec();
    started.hear(exec_started(1)).expect("started");
    assert!(matches!(started.hear(exec_started(1)), Err(Breach::OutOfTurn { .. })));
    assert!(matches!(started.hear(exec_failed(1, 1)), Err(Breach::OutOfTurn { .. })));
}

#[test]
fn container_ends_after_its_execs_but_not_after_those_that_crossed_its_end() {
    let mut conversation = running();
    conversation.executing(ExecId(1));
    conversation.hear(exec_started(1)).expect("started");
    assert!(matches!(conversation.hear(exited("c")), Err(Breach::Impossible(_))));

    let mut conversation = running();
    conversation.executing(ExecId(1));
    assert!(matches!(conversation.hear(exited("c")), Ok(Progress::Exited { .. })));
    assert!(matches!(conversation.hear(exec_failed(1, 1)), Ok(Progress::ExecFailed { .. })));
    let mut conversation = running();
    conversation.executing(ExecId(1));
    conversation.hear(exited("c")).expect("ended");
    assert!(matches!(conversation.hear(exec_started(1)), Err(Breach::OutOfTurn { .. })));
}

#[test]
fn answers_are_to_questions_and_of_their_kind() {
    let container = "c".to_owned();
    let answer =
        |request, answer| FromAgent::Answer { container: container.clone(), request, answer };
    let mut conversation = running();
    conversation.asking(1, &Question::Pause);
    conversation.asking(2, &Question::Processes);
    conversation.asking(3, &Question::Statistics);
    let refused = Answer::Refused("no".to_owned());
    assert!(matches!(conversation.hear(answer(3, refused)), Ok(Progress::Answered { .. })));
    assert!(matches!(conversation.hear(answer(1, Answer::Done)), Ok(Progress::Answered { .. })));
    let again = conversation.hear(answer(1, Answer::Done));
    assert_eq!(again, Err(Breach::Unknown("a question")));
    let mixed_up = conversation.hear(answer(2, Answer::Done));
    assert_eq!(mixed_up, Err(Breach::Impossible("answer")));
    let container = "other".to_owned();
    let of_another = FromAgent::Answer { container, request: 3, answer: Answer::Done };
    assert_eq!(conversation.hear(of_another), Err(Breach::OtherContainer));
}

#[test]
fn kills_only_grow_and_while_there_is_a_container() {
    let killed = |kills| FromAgent::OomKilled { container: "c".to_owned(), kills };
    let mut conversation = running();
    assert_eq!(conversation.hear(killed(2)), Ok(Progress::OomKilled { kills: 2 }));
    assert!(matches!(conversation.hear(killed(2)), Err(Breach::Impossible(_))));
    assert!(matches!(at(Stage::Creating).hear(killed(1)), Err(Breach::OutOfTurn { .. })));
}

proptest! {
    #[test]
    fn no_sequence_gives_an_exec_two_ends(order in prop::collection::vec((0u8..4, 0u32..3), 1..24)) {
        let mut conversation = running();
        let (mut sent, mut ended) = ([0; 3], [0; 3]);
        for (kind, exec) in order {
            let message = match kind {
                0 if sent[exec as usize] == 0 => {
                    conversation.executing(ExecId(exec));
                    sent[exec as usize] = 1;
                    continue;
                }
                0 | 1 => exec_started(exec),
                2 => exec_exited(exec),
                _ => exec_failed(exec, 1),
            };
            match conversation.hear(message) {
                Ok(Progress::ExecExited { exec, .. } | Progress::ExecFailed { exec, .. }) => {
                    ended[exec.0 as usize] += 1;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        prop_assert!(ended.iter().zip(sent).all(|(ended, sent)| *ended <= sent), "{:?}", ended);
    }

    #[test]
    fn no_sequence_reaches_an_exit_without_a_start(order in prop::collection::vec(0u8..5, 1..12)) {
        let mut conversation = Conversation::new("c");
        let container = || "c".to_owned();
        for kind in order {
            let message = match kind {
                0 => hello(VERSION),
                1 => FromAgent::Created { container: container() },
                2 => FromAgent::Started { container: container() },
                3 => exited("c"),
                _ => FromAgent::Failed {
                    container: container(),
                    phase: FailurePhase::Config,
                    message: String::new(),
                    exit_code: 1,
                },
            };
            let exited = matches!(conversation.hear(message), Ok(Progress::Exited { .. }));
            prop_assert!(!exited);
        }
    }
}
