//! A peer that speaks NBD, or does not: a server for our client, a client for our server, and one that is relayed.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use super::judge;
use crate::error::Error;
use crate::mirror::Announcement;
use crate::nbd::{Ahead, Connection, End, Export, Greeting, choose_export, negotiate, pass_requests, query_export};

/// Runs what never has to wait: all that a peer says is there from the begin, and then it has closed.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for more than the peer will say"),
    }
}

/// Judges an error of a connection.
fn judge_broken(error: &Error) {
    assert!(matches!(error, Error::Io { .. } | Error::NoSpace { .. }), "{error:?}");
    judge(error, "NBD");
}

/// A server that says the input, whatever it is asked.
pub(super) fn client(input: &[u8]) {
    let Some((kind, said)) = input.split_first() else { return };
    let mut stream = tokio::io::join(said, tokio::io::sink());
    let asked: Result<(), Error> = at_once(async {
        match kind {
            0 => {
                let greeting = Greeting::read(&mut stream).await?;
                assert_eq!(greeting.to_bytes(), said[..18]);
                let info = query_export(&mut stream, greeting, "export").await?;
                if let Some(Ok(announced)) = info.description.as_deref().map(str::parse::<Announcement>) {
                    assert_eq!(announced.to_string().parse(), Ok(announced));
                }
            }
            1 => {
                let greeting = Greeting::read(&mut stream).await?;
                drop(choose_export(&mut stream, greeting, "export").await?);
            }
            _ => {
                let mut connection = Connection::open(stream, "export").await?;
                let mut buffer = [0; 512];
                connection.read(0, &mut buffer).await?;
                if !connection.is_read_only() {
                    connection.write(connection.size() / 2, &[0; 512]).await?;
                    connection.write(0, &[1; 512]).await?;
                    connection.flush().await?;
                }
                connection.close().await?;
            }
        }
        Ok(())
    });
    if let Err(error) = asked {
        judge_broken(&error);
    }
}

/// A client that says the input, whatever it is answered.
pub(super) fn server(input: &[u8]) {
    let mut said = input;
    loop {
        let mut answers = Vec::new();
        let choice = match at_once(negotiate(&mut said, &mut answers)) {
            Ok(Some(choice)) => choice,
            Ok(None) => return,
            Err(error) => return judge_broken(&error),
        };
        assert!(choice.name.len() <= 8192 && answers.len() <= 18 + 64 * 20);
        at_once(choice.accept(&mut answers, Export { size: 1 << 20, flags: 1 })).unwrap();
        let before = said;
        let mut passed = Vec::new();
        let end = at_once(pass_requests(&mut said, &mut passed));
        // Nothing is added, left out or changed of what is passed on.
        assert_eq!(passed, before[..passed.len()]);
        match end {
            Ok(End::Goodbye) => {}
            Ok(End::Closed) => return assert!(said.is_empty() && passed.len() == before.len()),
            Err(error) => {
                return assert!(matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof));
            }
        }
    }
}

/// QEMU's client as a relay hears it, up to the first request that is not answered for the destination.
pub(super) fn relay(input: &[u8]) {
    let (mut passed, mut answers) = (Vec::new(), Vec::new());
    let (sent, answered) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut ahead = Ahead::new(input);
    let outcome = at_once(async {
        if ahead.pass_options(&mut passed, &sent).await? {
            ahead.answer_zeroes(&mut answers, &answered).await?;
        }
        Ok::<_, io::Error>(())
    });
    if let Err(error) = outcome {
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
    assert_eq!(sent.load(Ordering::Relaxed), passed.len() as u64);
    let answered = usize::try_from(answered.load(Ordering::Relaxed)).unwrap();
    assert!((16 * answered..=32 * answered).contains(&answers.len()));
    // What was neither passed on nor answered is left, as it came.
    let (buffer, rest) = ahead.into_parts();
    let left = [&buffer, rest].concat();
    assert!(input.starts_with(&passed) && input.ends_with(&left));
    let taken = input.len() - passed.len() - left.len();
    assert!((28 * answered..=32 * answered).contains(&taken), "{taken} bytes for {answered} answers");
}
