//! The service of payments as a program, for the demo: prints its address, and serves until it is stopped.

use hapax_tests::payments::Payments;

fn main() {
    let folder = std::env::args_os().nth(1).expect("the folder of its books");
    let service = Payments::start(folder.as_ref());
    println!("{}", service.url());
    loop {
        std::thread::park();
    }
}
